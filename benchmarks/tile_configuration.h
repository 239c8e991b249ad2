/* For compiling llama.cpp, see make bench-deps. GCC before 12.4 and 13.3 takes only the first eight bytes of a tile
 * configuration for read (GCC's bug 114098), leaves the others unwritten, and llama.cpp then crashes where a
 * processor has AMX. This says that all 64 bytes are read. */
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#undef _tile_loadconfig
#define _tile_loadconfig(place) __asm__ volatile("ldtilecfg\t%X0" ::"m"(*(const char(*)[64])(place)))
#endif
