#define KNNMOE_NAME _portable
#include "module.hpp"
