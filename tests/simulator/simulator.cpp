// What tests/test_persistent.py asks of the simulator.
#include "platform_simulator.h"

extern "C" void set_seed(unsigned seed) { simulator::seed = seed; }
extern "C" int64_t shared_memory_of_last_launch() { return simulator::last_shared; }
