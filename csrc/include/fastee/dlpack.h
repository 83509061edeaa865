/* The few DLPack structures of the C ABI (DLPack 1.x, https://dmlc.github.io/dlpack): layout-compatible with any dlpack.h. */
#ifndef FASTEE_DLPACK_H_
#define FASTEE_DLPACK_H_
#include <stdint.h>

#ifndef DLPACK_VERSION /* a host that already included dlpack.h keeps its own */
#ifndef DLPACK_MAJOR_VERSION
#define DLPACK_MAJOR_VERSION 1
enum { kDLCPU = 1, kDLCUDA = 2 };
enum { kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4, kDLBool = 6 };

typedef struct {
  int32_t device_type;
  int32_t device_id;
} DLDevice;

typedef struct {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
} DLDataType;

typedef struct {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides; /* in elements; NULL means row-major */
  uint64_t byte_offset;
} DLTensor;
#endif
#endif
#endif
