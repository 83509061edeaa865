/* One exit at four rows with nothing but fastee.h: who leaves, who stays, and the rows that stay as int8 for the wire.
 * Prints "label confidence exits" per row, the survivors' order, and the bytes of one packed row. */
#include <math.h>
#include <stdio.h>

#include "fastee/fastee.h"

enum { ROWS = 4, FEATURES = 3, CLASSES = 3 };

static DLTensor tensor(void* data, int32_t ndim, int64_t* shape, uint8_t code, uint8_t bits) {
  DLTensor t = {data, {kDLCPU, 0}, ndim, {code, bits, 1}, shape, NULL, 0};
  return t;
}

static int failed(fastee_status status) {
  if (status != FASTEE_OK) fprintf(stderr, "%d %s\n", (int)status, fastee_last_error());
  return status != FASTEE_OK;
}

int main(void) {
  /* The library that was loaded may be another than the one whose header this was compiled with. */
  if (fastee_abi_version() != FASTEE_ABI_VERSION) {
    fprintf(stderr, "libfastee has ABI %d, this program needs %d\n", (int)fastee_abi_version(), FASTEE_ABI_VERSION);
    return 2;
  }
  float x[ROWS][FEATURES] = {{9, 0, 0}, {1, 1, 1}, {0, 0, 9}, {0, NAN, 0}};
  float weight[CLASSES][FEATURES] = {{1, 0, 0}, {0, 1, 0}, {0, 0, 1}};
  int64_t x_shape[] = {ROWS, FEATURES}, weight_shape[] = {CLASSES, FEATURES};
  DLTensor vx = tensor(x, 2, x_shape, kDLFloat, 32), vw = tensor(weight, 2, weight_shape, kDLFloat, 32);

  int64_t label[ROWS], index[ROWS], count;
  float confidence[ROWS];
  uint8_t exits[ROWS];
  fastee_head head = {FASTEE_POOL_NONE, FASTEE_NORM_NONE, FASTEE_MAX_PROB, 0.0f, 1.0f, 0.9f, &vw, NULL, NULL, NULL, NULL, NULL};
  fastee_head_out out = {{label, NULL, NULL, NULL, NULL, NULL}, confidence, exits, NULL, index, &count};
  if (failed(fastee_exit_head(&vx, &head, &out, NULL))) return 1;
  for (int r = 0; r < ROWS; ++r) printf("%d %.4f %d\n", (int)label[r], confidence[r], exits[r]);

  float kept[ROWS][FEATURES], scale[ROWS];
  int8_t data[ROWS][FEATURES];
  int64_t kept_shape[] = {count, FEATURES}, scale_shape[] = {count, 1};
  DLTensor order = tensor(index, 1, kept_shape, kDLInt, 64), vk = tensor(kept, 2, kept_shape, kDLFloat, 32);
  DLTensor vd = tensor(data, 2, kept_shape, kDLInt, 8), vs = tensor(scale, 2, scale_shape, kDLFloat, 32);
  if (failed(fastee_gather_rows(&vx, &order, &vk, NULL)) || failed(fastee_quantize_rows(&vk, FASTEE_INT8, 0, &vd, &vs, NULL))) return 1;
  printf("stay %d: rows %d %d, %d %d %d\n", (int)count, (int)index[0], (int)index[1], data[0][0], data[0][1], data[0][2]);

  head.measure = (fastee_measure)9; /* what is wrong is named, never guessed */
  return failed(fastee_exit_head(&vx, &head, &out, NULL)) ? 0 : 1;
}
