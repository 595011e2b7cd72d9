// The kernels for every processor.
#include "kernels.h"

#define SINGD_INSTRUCTIONS plain
#define SINGD_VECTOR_BYTES 16
#define SINGD_TILE_ROWS 4
#define SINGD_TILE_VECTORS 2
#define SINGD_MOST_TILE_ROWS 4
#include "simd/kernels.h"
