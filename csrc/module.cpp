// The Python module: what was built. The ops themselves register with torch when it is loaded.
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "cpu/level.h"

namespace py = pybind11;

namespace {

std::vector<std::string> native_ops(c10::DispatchKey key) {
  std::vector<std::string> names;
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNamesForDispatchKey(key)) {
    if (name.getNamespace() == std::string("bioplaus")) {
      names.push_back(name.name.substr(std::string("bioplaus::").size()));
    }
  }
  return names;
}

py::dict build_config() {
  py::dict config;
  config["version"] = BK_VERSION;
  config["digest"] = BK_DIGEST;
  config["torch"] = BK_TORCH_VERSION;
  config["cxx_compiler"] = BK_CXX_COMPILER;
  config["cpu_levels"] = std::vector<std::string> BK_LEVELS;
#ifdef _OPENMP
  config["openmp"] = true;
#else
  config["openmp"] = false;
#endif
#ifdef BK_CUDA_VERSION
  config["cuda"] = BK_CUDA_VERSION;
  config["cuda_archs"] = py::str(BK_CUDA_ARCHS).attr("split")();
#else
  config["cuda"] = py::none();
  config["cuda_archs"] = py::list();
#endif
  config["native_ops"] = std::map<std::string, std::vector<std::string>>{{"CPU", native_ops(c10::DispatchKey::CPU)},
                                                                         {"CUDA", native_ops(c10::DispatchKey::CUDA)}};
  return config;
}

// A parallel_for compiled without OpenMP runs on one thread and says nothing, so count.
int num_threads_used() {
  std::mutex mutex;
  std::set<std::thread::id> threads;
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    const std::lock_guard<std::mutex> lock(mutex);
    threads.insert(std::this_thread::get_id());
  });
  return static_cast<int>(threads.size());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of bioplaus_kernels; importing it registers the ops of torch.ops.bioplaus.";
  m.def("build_config", build_config, "What was built, as a dict.");
  m.def(
      "active_cpu_level", [] { return bioplaus::level_name(bioplaus::cpu_level()); },
      "The instruction-set level that the CPU kernels run at.");
  m.def(
      "active_product_level", [] { return bioplaus::level_name(bioplaus::product_level()); },
      "The instruction-set level that the CPU's integer products run at.");
  m.def("num_threads_used", num_threads_used, "How many threads a parallel loop of this module really runs on.");
}
