// A status with its text: fail("compact: mask must be ..., got ...") stores the text for fastee_last_error().
#pragma once
#include <string>

#include "fastee/fastee.h"

namespace fastee {
fastee_status fail(fastee_status status, std::string text);
std::string describe(const DLTensor& t);  // "float32 [4, 7]"
}  // namespace fastee
