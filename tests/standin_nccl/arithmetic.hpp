// Reductions of NCCL's element types in host memory.
#pragma once

#include <cstddef>

#include "nccl/api.hpp"

namespace standin {

enum class Operator { sum, prod, max, min, avg };

size_t size_of(meshring::nccl::DataType type);  // 0: no such type
const char* name_of(meshring::nccl::DataType type);
const char* name_of(Operator op);

// target = ((in[0] op in[1]) op in[2]) ..., rounded once; avg divides the sum by n.
void reduce(void* target, const char* const* in, int n, size_t count, meshring::nccl::DataType type,
            Operator op);

// target = source * scalar, the scalar being one element of that type.
void scale(void* target, const void* source, const void* scalar, size_t count,
           meshring::nccl::DataType type);

}  // namespace standin
