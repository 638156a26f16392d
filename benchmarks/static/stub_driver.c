/* A CUDA driver that does nothing: one GPU of compute capability 9.0, which accepts every call. Under it Triton's own driver and
   launcher run on a machine without a GPU. `stub_refuse` makes the launches of cooperative grids return an error; what
   `stub_watch` is given is called with each other launch. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

typedef int CUresult;
typedef struct { int id; char pad[4]; union { int value; char bytes[64]; } of; } attribute; /* CUlaunchAttribute */
typedef struct { unsigned grid[3], block[3], shared; void *stream; attribute *attributes; unsigned count; } config;

typedef void (*watcher)(const config *launch, void *function, void **parameters);

static long launches = 0;
static int refusal = 0;
static watcher watch = NULL;

CUresult cuInit(unsigned flags) { return 0; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return 0; }
CUresult cuDeviceGetCount(int *count) { *count = 1; return 0; }
CUresult cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 16 ? 132 : attribute == 97 ? 227 * 1024 : attribute == 95 ? 1 : 1024; /* SMs, shared memory, cooperative */
  return 0;
}
CUresult cuGetErrorString(CUresult code, const char **text) {
  *text = code == 1 ? "invalid argument" : code == 701 ? "too many resources requested for launch"
        : code == 720 ? "too many blocks in cooperative launch" : code == 801 ? "operation not supported"
        : code == 700 ? "an illegal memory access was encountered" : "unspecified launch failure";
  return 0;
}
CUresult cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
CUresult cuCtxSetCurrent(void *context) { return 0; }
CUresult cuCtxGetDevice(int *device) { *device = 0; return 0; }
CUresult cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
CUresult cuCtxSetLimit(int limit, size_t value) { return 0; }
CUresult cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
CUresult cuModuleLoadData(void **module, const void *image) { *module = (void *)2; return 0; }
CUresult cuModuleUnload(void *module) { return 0; }
CUresult cuModuleGetFunction(void **function, void *module, const char *name) { *function = malloc(1); return 0; }
CUresult cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute == 0 ? 1024 : 0; return 0; }
CUresult cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
CUresult cuFuncSetCacheConfig(void *function, int config) { return 0; }
CUresult cuStreamIsCapturing(void *stream, int *capturing) { *capturing = 0; return 0; }
CUresult cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) { *(uint64_t *)data = pointer; return 0; }
CUresult cuOccupancyMaxActiveClusters(int *clusters, void *function, void *config) { *clusters = 1; return 0; }
CUresult cuTensorMapEncodeTiled(void) { return 0; }
CUresult cuTensorMapEncodeIm2col(void) { return 0; }
CUresult cuLaunchKernelEx(const config *launch, void *function, void **parameters, void **extra) {
  for (unsigned i = 0; i < launch->count; i++) /* 2: CU_LAUNCH_ATTRIBUTE_COOPERATIVE */
    if (refusal && launch->attributes[i].id == 2 && launch->attributes[i].of.value) return refusal;
  launches++;
  if (watch) watch(launch, function, parameters);
  return 0;
}
CUresult cuLaunchKernel(void *f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                        void *stream, void **parameters, void **extra) { launches++; return 0; }
long stub_launches(void) { return launches; }
void stub_refuse(int code) { refusal = code; }
void stub_watch(watcher given) { watch = given; }
