# Where a Python with torch is at hand, the files that include torch appear in compile_commands.json
# as well. The target is never built: setup.py compiles them.
find_package(Python3 COMPONENTS Interpreter Development.Module QUIET)
if(Python3_Interpreter_FOUND AND Python3_Development.Module_FOUND)
  execute_process(
    COMMAND ${Python3_EXECUTABLE} -c
            "import torch; from torch.utils.cpp_extension import include_paths; \
print(';'.join(include_paths())); print(torch.__version__)"
    OUTPUT_VARIABLE torch_facts
    RESULT_VARIABLE torch_missing
    ERROR_QUIET
    OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(torch_missing EQUAL 0)
    string(REGEX REPLACE "\n.*" "" torch_includes "${torch_facts}")
    string(REGEX REPLACE "^[^\n]*\n" "" torch_version "${torch_facts}")
    singd_sources(torch TORCH_SOURCES)
    singd_sources(python PYTHON_SOURCES)
    add_library(singd_extension_for_editors OBJECT EXCLUDE_FROM_ALL ${TORCH_SOURCES}
                                                                     ${PYTHON_SOURCES})
    target_include_directories(singd_extension_for_editors SYSTEM PRIVATE ${torch_includes}
                                                                          ${Python3_INCLUDE_DIRS})
    target_compile_definitions(singd_extension_for_editors
                               PRIVATE SINGD_TORCH_VERSION=${torch_version})
    set_target_properties(singd_extension_for_editors PROPERTIES CXX_STANDARD 20)
  endif()
endif()
