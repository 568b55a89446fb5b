// The entry points of the CUDA driver and of NVRTC, opened at run time, so that the extension
// builds without a toolkit and imports on a machine without a GPU. Types and values are those of
// cuda.h and nvrtc.h, of which only what is used here is written down.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/params.cuh"
#include "status.h"

namespace fp8gemm {

using CUresult = int;  // 0: success
using CUdevice = int;
using CUcontext = struct CUctx_st*;
using CUmodule = struct CUmod_st*;
using CUfunction = struct CUfunc_st*;
using CUstream = struct CUstream_st*;

struct CUlaunchAttribute {
  int id;
  char pad[4];
  union {
    char bytes[64];
    struct {
      unsigned x, y, z;
    } cluster;
  } value;
};
static_assert(sizeof(CUlaunchAttribute) == 72);

struct CUlaunchConfig {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
  CUstream stream;
  CUlaunchAttribute* attributes;
  unsigned attribute_count;
};

constexpr int kLaunchAttributeClusterDimension = 4;
constexpr int kFuncAttributeMaxDynamicSharedBytes = 8;
constexpr int kDeviceAttributeMultiprocessorCount = 16;
constexpr int kDeviceAttributeComputeCapabilityMajor = 75;
constexpr int kDeviceAttributeComputeCapabilityMinor = 76;

// CUtensorMapDataType, CUtensorMapSwizzle, CUtensorMapL2promotion
constexpr int kTensorMapUint8 = 0, kTensorMapFloat32 = 7, kTensorMapBfloat16 = 9;
constexpr int kTensorMapSwizzleNone = 0, kTensorMapSwizzle32 = 1, kTensorMapSwizzle64 = 2,
              kTensorMapSwizzle128 = 3;
constexpr int kTensorMapPromotion256 = 3;

struct Driver {
  CUresult (*init)(unsigned);
  CUresult (*version)(int*);
  CUresult (*error_string)(CUresult, const char**);
  CUresult (*device_count)(int*);
  CUresult (*device_get)(CUdevice*, int);
  CUresult (*device_name)(char*, int, CUdevice);
  CUresult (*device_attribute)(int*, int, CUdevice);
  CUresult (*context_current)(CUcontext*);
  CUresult (*context_set_current)(CUcontext);
  CUresult (*context_device)(CUdevice*);
  CUresult (*context_id)(CUcontext, unsigned long long*);
  CUresult (*stream_context)(CUstream, CUcontext*);
  CUresult (*module_load)(CUmodule*, const void*);
  CUresult (*module_function)(CUfunction*, CUmodule, const char*);
  CUresult (*function_set_attribute)(CUfunction, int, int);
  CUresult (*launch)(const CUlaunchConfig*, CUfunction, void**, void**);
  CUresult (*encode_tiled)(TensorMap*, int type, uint32_t rank, void* address, const uint64_t* dims,
                           const uint64_t* strides, const uint32_t* box,
                           const uint32_t* element_strides, int interleave, int swizzle,
                           int promotion, int out_of_bounds_fill);
};

// Kept once it is open; the error says what is missing and what to do about it.
Result<const Driver*> driver();

// "what: <the driver's words>", or success.
Status check(const Driver& driver, CUresult result, const std::string& what);

using nvrtcProgram = struct _nvrtcProgram*;

struct Nvrtc {
  std::string path;
  int major, minor;
  int (*version)(int*, int*);
  const char* (*error_string)(int);
  int (*create)(nvrtcProgram*, const char*, const char*, int, const char* const*,
                const char* const*);
  int (*destroy)(nvrtcProgram*);
  int (*compile)(nvrtcProgram, int, const char* const*);
  int (*log_size)(nvrtcProgram, size_t*);
  int (*log)(nvrtcProgram, char*);
  int (*cubin_size)(nvrtcProgram, size_t*);
  int (*cubin)(nvrtcProgram, char*);
  int (*ptx_size)(nvrtcProgram, size_t*);
  int (*ptx)(nvrtcProgram, char*);
};

// path: of the library, as native.py found it; empty when it found none.
Result<const Nvrtc*> nvrtc(const std::string& path);

}  // namespace fp8gemm
