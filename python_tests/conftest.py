"""Set-up of all tests."""

import torch

# For tensors as small as those of the tests, waking a second thread costs more than it saves.
# test_threads.py runs the operators on several.
torch.set_num_threads(1)
