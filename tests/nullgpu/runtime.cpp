// The CUDA runtime of a GPU that does nothing. Preloaded, it takes the place of libcudart in PyTorch's CUDA build.
//
// Memory of the device is memory of the host. Kernels are counted and not run, so every value is meaningless. Copies
// and waits are counted, and reported to a callback, which can tell where in the program they were made.
#include <cuda_runtime_api.h>
#include <sys/mman.h>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace {

struct Counters {  // in the order of COUNTERS in stand_in.py
  long kernels, copies_from_pinned, copies_from_pageable, copies_to_host, copies_on_device, waits;
} counters;

enum Kind { WAIT, COPY_TO_HOST, COPY_FROM_PAGEABLE };
void (*callback)(int kind, long n_bytes) = nullptr;

void report(Kind kind, long n_bytes = 0) {
  if (callback) callback(kind, n_bytes);
}

cudaError_t wait() {
  counters.waits++;
  report(WAIT);
  return cudaSuccess;
}

// Allocations of one kind, by address. Pages are taken from the system when they are first touched.
class Memory {
 public:
  cudaError_t allocate(void** pointer, size_t size) {
    size = size ? size : 1;
    *pointer = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    std::lock_guard<std::mutex> guard(lock);
    sizes[static_cast<char*>(*pointer)] = size;
    return cudaSuccess;
  }
  cudaError_t release(void* pointer) {
    std::lock_guard<std::mutex> guard(lock);
    auto entry = sizes.find(static_cast<char*>(pointer));
    if (entry != sizes.end()) {
      munmap(pointer, entry->second);
      sizes.erase(entry);
    }
    return cudaSuccess;
  }
  bool holds(const void* pointer) {
    auto address = const_cast<char*>(static_cast<const char*>(pointer));
    std::lock_guard<std::mutex> guard(lock);
    auto entry = sizes.upper_bound(address);
    return entry != sizes.begin() && address < (--entry)->first + entry->second;
  }

 private:
  std::map<char*, size_t> sizes;
  std::mutex lock;
} device, pinned;

const size_t LARGEST_COPY = 1 << 20;  // bytes; larger copies are only counted

cudaError_t copy(void* target, const void* source, size_t size) {
  bool from_device = device.holds(source), to_device = device.holds(target);
  if (from_device && to_device) {
    counters.copies_on_device++;
    return cudaSuccess;
  }
  if (from_device) {
    counters.copies_to_host++;
    report(COPY_TO_HOST, size);
  } else if (to_device && pinned.holds(source)) {
    counters.copies_from_pinned++;
  } else if (to_device) {
    counters.copies_from_pageable++;
    report(COPY_FROM_PAGEABLE, size);
  }
  if (size <= LARGEST_COPY) memcpy(target, source, size);
  return cudaSuccess;
}

cudaError_t fill(void* target, int value, size_t size) {
  if (size <= LARGEST_COPY) memset(target, value, size);
  return cudaSuccess;
}

cudaError_t count_kernel() {
  counters.kernels++;
  return cudaSuccess;
}

template <class Handle>
cudaError_t make_handle(Handle* handle) {  // of a stream or an event: only its identity matters
  static uintptr_t last = 0x1000;
  *handle = reinterpret_cast<Handle>(last += 16);
  return cudaSuccess;
}

int do_nothing() { return 0; }

int primary_context_is_active(int, unsigned* flags, int* is_active) {
  if (flags) *flags = 0;
  if (is_active) *is_active = 1;
  return 0;
}

thread_local int current_device = 0;
thread_local struct { dim3 grid, block; size_t shared; void* stream; } launches[64];
thread_local int n_launches = 0;

}  // namespace

extern "C" {

Counters* stand_in_counters() { return &counters; }
void stand_in_callback(void (*function)(int, long)) { callback = function; }

// The device: an H200 by its properties.
cudaError_t cudaGetDeviceCount(int* count) { *count = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int* number) { *number = current_device; return cudaSuccess; }
cudaError_t cudaSetDevice(int number) { current_device = number; return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "a GPU that does nothing");
  p->totalGlobalMem = 141ull << 30;
  p->totalConstMem = 1 << 16;
  p->sharedMemPerBlock = 48 << 10;
  p->sharedMemPerBlockOptin = 227 << 10;
  p->sharedMemPerMultiprocessor = 228 << 10;
  p->regsPerBlock = p->regsPerMultiprocessor = 1 << 16;
  p->l2CacheSize = 60 << 20;
  p->warpSize = 32;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = INT32_MAX;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->major = 9;
  p->multiProcessorCount = 132;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->textureAlignment = 512;
  p->unifiedAddressing = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 227 << 10; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 228 << 10; break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = 1 << 16; break;
    case cudaDevAttrMaxGridDimX: *value = INT32_MAX; break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    case cudaDevAttrL2CacheSize: *value = 60 << 20; break;
    default: *value = 1;
  }
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* id, int size, int) { strncpy(id, "0000:00:00.0", size); return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { *can = 1; return cudaSuccess; }
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  bool is_state = !strcmp(name, "cuDevicePrimaryCtxGetState");
  *function = is_state ? (void*)primary_context_is_active : (void*)do_nothing;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }

// Streams and events: all work is done at once, so nothing is ever pending.
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return make_handle(stream); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return make_handle(stream); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) { return make_handle(stream); }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t*, const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
  *status = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaStreamAddCallback(cudaStream_t, cudaStreamCallback_t, void*, unsigned) { return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t* event) { return make_handle(event); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return make_handle(event); }
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t, cudaStream_t, unsigned) { return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 1;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return wait(); }
cudaError_t cudaDeviceSynchronize() { return wait(); }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return wait(); }

// Memory.
cudaError_t cudaMalloc(void** pointer, size_t size) { return device.allocate(pointer, size); }
cudaError_t cudaMallocAsync(void** pointer, size_t size, cudaStream_t) { return device.allocate(pointer, size); }
cudaError_t cudaFree(void* pointer) { return device.release(pointer); }
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return device.release(pointer); }
cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned) { return pinned.allocate(pointer, size); }
cudaError_t cudaMallocHost(void** pointer, size_t size) { return pinned.allocate(pointer, size); }
cudaError_t cudaFreeHost(void* pointer) { return pinned.release(pointer); }
cudaError_t cudaHostRegister(void*, size_t, unsigned) { return cudaSuccess; }
cudaError_t cudaHostUnregister(void*) { return cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  *available = *total = 140ull << 30;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  memset(attributes, 0, sizeof *attributes);
  attributes->type = device.holds(pointer)   ? cudaMemoryTypeDevice
                     : pinned.holds(pointer) ? cudaMemoryTypeHost
                                             : cudaMemoryTypeUnregistered;
  attributes->devicePointer = attributes->hostPointer = const_cast<void*>(pointer);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t size, cudaMemcpyKind, cudaStream_t) {
  return copy(target, source, size);
}
cudaError_t cudaMemcpy(void* target, const void* source, size_t size, cudaMemcpyKind) {
  copy(target, source, size);
  return wait();
}
cudaError_t cudaMemcpyPeerAsync(void* target, int, const void* source, int, size_t size, cudaStream_t) {
  return copy(target, source, size);
}
cudaError_t cudaMemset(void* target, int value, size_t size) { return fill(target, value, size); }
cudaError_t cudaMemsetAsync(void* target, int value, size_t size, cudaStream_t) { return fill(target, value, size); }
cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }
cudaError_t cudaGetSymbolAddress(void** pointer, const void*) { return device.allocate(pointer, 1 << 20); }

// Kernels.
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  memset(attributes, 0, sizeof *attributes);
  attributes->ptxVersion = attributes->binaryVersion = 90;
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  attributes->maxDynamicSharedSizeBytes = 48 << 10;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  *blocks = 2;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return count_kernel(); }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**) { return count_kernel(); }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return count_kernel(); }
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = (cudaKernel_t)function;
  return cudaSuccess;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  launches[n_launches++] = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  auto& launch = launches[--n_launches];
  *grid = launch.grid;
  *block = launch.block;
  *shared = launch.shared;
  *static_cast<void**>(stream) = launch.stream;
  return cudaSuccess;
}
void** __cudaRegisterFatBinary(void*) { static void* handle; return &handle; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*, void*, int*) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

}  // extern "C"
