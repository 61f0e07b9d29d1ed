// What needs torch's Python headers. bridge.cpp cannot include them: it defines a private function of Python
// that Python's headers declare differently from version to version.
#include <torch/csrc/autograd/python_variable.h>

extern "C" {

// The tensor that a Python object holds, null for any other object. It lives as long as the object.
// Needs the GIL.
const at::Tensor* tllib_unpack(PyObject* object) {
  return THPVariable_Check(object) ? &THPVariable_Unpack(object) : nullptr;
}

}  // extern "C"
