#define KNNMOE_NAME _x86_64_v4
#include "module.hpp"
