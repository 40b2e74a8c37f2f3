#define KNNMOE_NAME _x86_64_v3
#include "module.hpp"
