// The Python module: what was built. The ops themselves register with torch when it is loaded. By Python's limited API,
// so that one build serves every Python from 3.11 on.
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <Python.h>

#include <iterator>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "cpu/level.h"

namespace {

PyObject* list(const std::vector<std::string>& names) {
  PyObject* made = PyList_New(0);
  for (const auto& name : names) {
    PyObject* item = PyUnicode_FromString(name.c_str());
    PyList_Append(made, item);
    Py_DECREF(item);
  }
  return made;
}

PyObject* native_ops(c10::DispatchKey key) {
  std::vector<std::string> names;
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNamesForDispatchKey(key)) {
    if (name.getNamespace() == std::string("bioplaus")) {
      names.push_back(name.name.substr(std::string("bioplaus::").size()));
    }
  }
  return list(names);
}

#ifdef BK_CUDA_VERSION
std::vector<std::string> words(const char* text) {
  std::istringstream in(text);
  return {std::istream_iterator<std::string>(in), {}};
}
#endif

PyObject* build_config(PyObject*, PyObject*) {
#ifdef _OPENMP
  PyObject* openmp = Py_True;
#else
  PyObject* openmp = Py_False;
#endif
#ifdef BK_CUDA_VERSION
  const char* cuda = BK_CUDA_VERSION;
  const std::vector<std::string> archs = words(BK_CUDA_ARCHS);
#else
  const char* cuda = nullptr;
  const std::vector<std::string> archs;
#endif
  return Py_BuildValue("{s:s,s:s,s:s,s:s,s:N,s:O,s:z,s:N,s:{s:N,s:N}}",                                   //
                       "version", BK_VERSION, "digest", BK_DIGEST, "torch", BK_TORCH_VERSION,             //
                       "cxx_compiler", BK_CXX_COMPILER, "cpu_levels", list(BK_LEVELS), "openmp", openmp,  //
                       "cuda", cuda, "cuda_archs", list(archs), "native_ops",                             //
                       "CPU", native_ops(c10::DispatchKey::CPU), "CUDA", native_ops(c10::DispatchKey::CUDA));
}

PyObject* active_cpu_level(PyObject*, PyObject*) {
  return PyUnicode_FromString(bioplaus::level_name(bioplaus::cpu_level()));
}

PyObject* active_product_level(PyObject*, PyObject*) {
  return PyUnicode_FromString(bioplaus::level_name(bioplaus::product_level()));
}

PyObject* half_instructions(PyObject*, PyObject* bfloat16) {
  return PyBool_FromLong(bioplaus::half_instructions(PyObject_IsTrue(bfloat16)));
}

// A parallel_for compiled without OpenMP runs on one thread and says nothing, so count.
PyObject* num_threads_used(PyObject*, PyObject*) {
  std::mutex mutex;
  std::set<std::thread::id> threads;
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    const std::lock_guard<std::mutex> lock(mutex);
    threads.insert(std::this_thread::get_id());
  });
  return PyLong_FromSize_t(threads.size());
}

PyMethodDef functions[] = {
    {"build_config", build_config, METH_NOARGS, "What was built, as a dict."},
    {"active_cpu_level", active_cpu_level, METH_NOARGS, "The instruction-set level that the CPU kernels run at."},
    {"active_product_level", active_product_level, METH_NOARGS,
     "The instruction-set level that the CPU's integer products run at."},
    {"half_instructions", half_instructions, METH_O,
     "Whether the processor multiplies bfloat16 (else float16) itself."},
    {"num_threads_used", num_threads_used, METH_NOARGS,
     "How many threads a parallel loop of this module really runs on."},
    {}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_C",
                          "Native kernels of bioplaus_kernels; importing it registers the ops of torch.ops.bioplaus.",
                          0,
                          functions,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

#ifdef __GLIBC__
// std::shared_ptr reads it, and glibc has it from 2.32 on. With one of the module's own a wheel runs from 2.28 on.
extern "C" char __libc_single_threaded;
char __libc_single_threaded = 0;
#endif

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
