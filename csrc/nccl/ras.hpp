// F1. What NCCL's RAS service says of the job: who is unresponsive, who is behind in which call.
#pragma once

#include <string>

namespace meshring::nccl {

// Asks the service of this host (NCCL_RAS_ADDR, else localhost:28028), up to two seconds; "" when
// it does not answer. Source: NCCL's user guide, RAS, "verbose status".
std::string ras_report(int version);

}  // namespace meshring::nccl
