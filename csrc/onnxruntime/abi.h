// The part of ONNX Runtime's C interface that custom operators need, declared by hand.
//
// The onnxruntime wheel has no headers, and a build from source must not download any. The interface makes this safe:
// within a version nothing changes, and later versions only append. So these declarations hold for every ONNX Runtime
// since 1.24. In the table of functions only those in use have names; the others are gaps. The assertions below check
// every offset, and tests/csrc/test_onnxruntime_library.py calls every function through a real session.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

// The first version with KernelInfo_GetConfigEntries, the newest function in use (ONNX Runtime 1.24, 2026).
constexpr uint32_t kOrtApiVersion = 24;
// Of the structure OrtCustomOp below, which later versions continue.
constexpr uint32_t kOrtCustomOpVersion = 17;

struct OrtCustomOpDomain;
struct OrtKernelContext;
struct OrtKernelInfo;
struct OrtKeyValuePairs;
struct OrtSessionOptions;
struct OrtShapeInferContext;
struct OrtStatus;  // null for success
struct OrtTensorTypeAndShapeInfo;
struct OrtValue;

enum OrtErrorCode : int { kOrtFail = 1, kOrtInvalidArgument = 2 };

// Up to 16 the same numbers as onnx.TensorProto.DataType; the larger ones are ONNX Runtime's own.
enum OrtElementType : int {
  kOrtUndefined = 0,
  kOrtFloat32 = 1,
  kOrtInt8 = 3,
  kOrtInt64 = 7,
  kOrtBool = 9,
  kOrtFloat16 = 10,
  kOrtBFloat16 = 16,
  kOrtInt4 = 22,
};

enum OrtCharacteristic : int { kOrtRequired = 0, kOrtOptional = 1 };
enum OrtMemoryType : int { kOrtHostMemory = -2, kOrtDefaultMemory = 0 };

struct OrtApi {
  OrtStatus* (*CreateStatus)(OrtErrorCode code, const char* message);
  void* gap_1;
  const char* (*GetErrorMessage)(const OrtStatus* status);
  void* gap_3[23];
  OrtStatus* (*CreateCustomOpDomain)(const char* name, OrtCustomOpDomain** domain);
  OrtStatus* (*CustomOpDomain_Add)(OrtCustomOpDomain* domain, const struct OrtCustomOp* op);
  OrtStatus* (*AddCustomOpDomain)(OrtSessionOptions* options, OrtCustomOpDomain* domain);
  void* gap_29[22];
  OrtStatus* (*GetTensorMutableData)(OrtValue* value, void** data);
  void* gap_52[8];
  OrtStatus* (*GetTensorElementType)(const OrtTensorTypeAndShapeInfo* info, OrtElementType* type);
  OrtStatus* (*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo* info, size_t* count);
  OrtStatus* (*GetDimensions)(const OrtTensorTypeAndShapeInfo* info, int64_t* dimensions, size_t count);
  void* gap_63;
  OrtStatus* (*GetTensorShapeElementCount)(const OrtTensorTypeAndShapeInfo* info, size_t* count);
  OrtStatus* (*GetTensorTypeAndShape)(const OrtValue* value, OrtTensorTypeAndShapeInfo** info);
  void* gap_66[19];
  OrtStatus* (*KernelInfoGetAttribute_float)(const OrtKernelInfo* info, const char* name, float* value);
  OrtStatus* (*KernelInfoGetAttribute_int64)(const OrtKernelInfo* info, const char* name, int64_t* value);
  void* gap_87[3];
  OrtStatus* (*KernelContext_GetInput)(const OrtKernelContext* context, size_t index, const OrtValue** value);
  OrtStatus* (*KernelContext_GetOutput)(OrtKernelContext* context, size_t index, const int64_t* dimensions,
                                        size_t count, OrtValue** value);
  void* gap_92;
  void (*ReleaseStatus)(OrtStatus* status);
  void* gap_94[5];
  void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo* info);
  void* gap_100;
  void (*ReleaseCustomOpDomain)(OrtCustomOpDomain* domain);
  void* gap_102[91];
  OrtStatus* (*KernelContext_GetGPUComputeStream)(const OrtKernelContext* context, void** stream);
  void* gap_194[55];
  // The value is in the memory of the kernel's provider; null if the input is not a constant.
  OrtStatus* (*KernelInfoGetConstantInput_tensor)(const OrtKernelInfo* info, size_t index, int* is_constant,
                                                  const OrtValue** value);
  void* gap_250[24];
  // Calls function(state, index) for every index below count. With 0 batches, each free thread takes the next index.
  OrtStatus* (*KernelContext_ParallelFor)(const OrtKernelContext* context, void (*function)(void*, size_t),
                                          size_t count, size_t batches, void* state);
  void* gap_275[22];
  const char* (*GetKeyValue)(const OrtKeyValuePairs* pairs, const char* key);  // null: it has none
  void* gap_298[2];
  void (*ReleaseKeyValuePairs)(OrtKeyValuePairs* pairs);
  void* gap_301[90];
  OrtStatus* (*KernelInfo_GetConfigEntries)(const OrtKernelInfo* info, OrtKeyValuePairs** pairs);
};

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);  // null for a version newer than this ONNX Runtime
  const char* (*GetVersionString)();
};

// A library's description of an operator. Null stands for the default where a comment says so.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);  // null: CreateKernelV2
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);  // returns null for the CPU
  OrtElementType (*GetInputType)(const OrtCustomOp*, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  OrtElementType (*GetOutputType)(const OrtCustomOp*, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void* kernel, OrtKernelContext*);  // null: KernelComputeV2
  void (*KernelDestroy)(void* kernel);
  OrtCharacteristic (*GetInputCharacteristic)(const OrtCustomOp*, size_t index);
  OrtCharacteristic (*GetOutputCharacteristic)(const OrtCustomOp*, size_t index);
  OrtMemoryType (*GetInputMemoryType)(const OrtCustomOp*, size_t index);
  int (*variadic[4])(const OrtCustomOp*);  // called only for variadic inputs and outputs
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
  OrtStatus* (*InferOutputShape)(const OrtCustomOp*, OrtShapeInferContext*);  // null: shapes are known at run time
  int (*GetStartVersion)(const OrtCustomOp*);                                 // null: 1
  int (*GetEndVersion)(const OrtCustomOp*);                                   // null: none
};

}  // extern "C"

// The offsets in ONNX Runtime's own header.
#define HEALTHGPT_IS_AT(structure, member, place) \
  static_assert(offsetof(structure, member) == (place) * sizeof(void*), #member " must be at " #place)

HEALTHGPT_IS_AT(OrtApi, CreateStatus, 0);
HEALTHGPT_IS_AT(OrtApi, GetErrorMessage, 2);
HEALTHGPT_IS_AT(OrtApi, CreateCustomOpDomain, 26);
HEALTHGPT_IS_AT(OrtApi, CustomOpDomain_Add, 27);
HEALTHGPT_IS_AT(OrtApi, AddCustomOpDomain, 28);
HEALTHGPT_IS_AT(OrtApi, GetTensorMutableData, 51);
HEALTHGPT_IS_AT(OrtApi, GetTensorElementType, 60);
HEALTHGPT_IS_AT(OrtApi, GetDimensionsCount, 61);
HEALTHGPT_IS_AT(OrtApi, GetDimensions, 62);
HEALTHGPT_IS_AT(OrtApi, GetTensorShapeElementCount, 64);
HEALTHGPT_IS_AT(OrtApi, GetTensorTypeAndShape, 65);
HEALTHGPT_IS_AT(OrtApi, KernelInfoGetAttribute_float, 85);
HEALTHGPT_IS_AT(OrtApi, KernelInfoGetAttribute_int64, 86);
HEALTHGPT_IS_AT(OrtApi, KernelContext_GetInput, 90);
HEALTHGPT_IS_AT(OrtApi, KernelContext_GetOutput, 91);
HEALTHGPT_IS_AT(OrtApi, ReleaseStatus, 93);
HEALTHGPT_IS_AT(OrtApi, ReleaseTensorTypeAndShapeInfo, 99);
HEALTHGPT_IS_AT(OrtApi, ReleaseCustomOpDomain, 101);
HEALTHGPT_IS_AT(OrtApi, KernelContext_GetGPUComputeStream, 193);
HEALTHGPT_IS_AT(OrtApi, KernelInfoGetConstantInput_tensor, 249);
HEALTHGPT_IS_AT(OrtApi, KernelContext_ParallelFor, 274);
HEALTHGPT_IS_AT(OrtApi, GetKeyValue, 297);
HEALTHGPT_IS_AT(OrtApi, ReleaseKeyValuePairs, 300);
HEALTHGPT_IS_AT(OrtApi, KernelInfo_GetConfigEntries, 391);
HEALTHGPT_IS_AT(OrtCustomOp, GetInputMemoryType, 12);
HEALTHGPT_IS_AT(OrtCustomOp, CreateKernelV2, 17);
HEALTHGPT_IS_AT(OrtCustomOp, GetEndVersion, 21);

#undef HEALTHGPT_IS_AT
