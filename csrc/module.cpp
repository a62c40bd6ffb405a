// The native side of fastvae at a glance: every op's schema, and what Python may ask about the build.
// Equations and shapes: fastvae/ops/<op>.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"

STABLE_TORCH_LIBRARY(fastvae, m) {
  m.def(
      "layer_norm_lstm(Tensor x, Tensor weight_hh, Tensor norm_weight, Tensor norm_bias, Tensor h0, Tensor c0, "
      "float eps, bool save, Tensor? lengths=None) "
      "-> (Tensor h, Tensor c_n, Tensor c, Tensor normalized, Tensor rstd)");
  m.def(
      "layer_norm_lstm_backward(Tensor dh, Tensor dc_n, Tensor weight_hh, Tensor norm_weight, Tensor norm_bias, "
      "Tensor h0, Tensor c0, Tensor h, Tensor c, Tensor normalized, Tensor rstd, Tensor? lengths=None) "
      "-> (Tensor dx, Tensor dweight_hh, Tensor dnorm_weight, Tensor dnorm_bias, Tensor dh0, Tensor dc0)");

  m.def("highway_conv_project(Tensor x, Tensor weight, Tensor bias) -> (Tensor a, Tensor mean, Tensor m2)");
  m.def(
      "highway_conv_project_backward(Tensor da, Tensor dmean, Tensor dm2, Tensor x, Tensor weight, Tensor a, "
      "Tensor mean) -> (Tensor dx, Tensor dweight, Tensor dbias)");
  m.def("highway_conv_gate(Tensor a, Tensor x, Tensor mean, Tensor scale, Tensor shift, bool carry) -> Tensor");
  m.def(
      "highway_conv_gate_backward(Tensor dy, Tensor a, Tensor x, Tensor mean, Tensor scale, Tensor shift, bool carry) "
      "-> (Tensor da, Tensor dx, Tensor dmean, Tensor dscale, Tensor dshift)");
  m.def("highway_conv(Tensor x, Tensor weight, Tensor bias, bool carry) -> Tensor");

  m.def("linear(Tensor? x, Tensor weight, Tensor bias, Tensor? tokens) -> Tensor");
  m.def(
      "linear_backward(Tensor da, Tensor? x, Tensor weight, Tensor? tokens) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias)");

  m.def("unfold(Tensor x) -> Tensor");
  m.def("fold(Tensor windows, Tensor? bias=None) -> Tensor");

  m.def("gumbel_noise(Tensor seed, SymInt steps, SymInt batch, SymInt vocab_size, float temperature) -> Tensor");
  m.def(
      "decode_lstm(Tensor features, Tensor feature_weight, Tensor token_embeddings, Tensor weight_hh, Tensor "
      "norm_weight, "
      "Tensor norm_bias, Tensor classifier_weight, Tensor classifier_bias, Tensor h0, Tensor c0, Tensor? noise, "
      "float eps, int? end_id=None, int? pad_id=None, Tensor? packed=None, bool int8=False) -> Tensor");
  m.def(
      "decode_lstm_pack(Tensor feature_weight, Tensor weight_hh, Tensor classifier_weight, Tensor? "
      "token_embeddings=None, bool int8=False) -> Tensor");
  m.def(
      "decode_bytenet(Tensor features, Tensor feature_weight, Tensor token_embeddings, Tensor conv_weight, "
      "Tensor conv_bias, Tensor classifier_weight, Tensor classifier_bias, Tensor? noise, bool carry, int? "
      "end_id=None, "
      "int? pad_id=None, Tensor? packed=None, bool int8=False) -> Tensor");
  m.def(
      "decode_bytenet_pack(Tensor feature_weight, Tensor conv_weight, Tensor classifier_weight, bool int8=False) -> "
      "Tensor");

  // One launch a sequence, on GPUs (cuda/); what launches them plans who computes what (kernels/persistent.py).
  m.def(
      "layer_norm_lstm_persistent(Tensor x, Tensor weight_hh, Tensor norm_weight, Tensor norm_bias, Tensor h0, "
      "Tensor c0, float eps, bool save, int groups, int units, int columns, int threads) "
      "-> (Tensor h, Tensor c_n, Tensor c, Tensor normalized, Tensor rstd)");
  m.def(
      "decode_lstm_persistent(Tensor projected, Tensor projected_cross, Tensor start_cross, Tensor token_embeddings, "
      "Tensor row_means, Tensor weight_hh, Tensor norm_weight, Tensor norm_bias, Tensor classifier_weight, "
      "Tensor classifier_bias, Tensor cross_weight, Tensor h0, Tensor c0, Tensor? noise, float eps, int? end_id, "
      "int? pad_id, int groups, int units, int columns, int threads) -> Tensor");
  m.def(
      "decode_bytenet_persistent(Tensor projected, Tensor token_embeddings, Tensor conv_weight, Tensor conv_bias, "
      "Tensor classifier_weight, Tensor classifier_bias, Tensor? noise, bool carry, int? end_id, int? pad_id, "
      "int groups, int units, int classifier_blocks, int columns, int threads) -> Tensor");
}

namespace py = pybind11;

uint64_t checksum(uintptr_t address, int64_t bytes);                          // checksum.cpp
double machine_peak(const std::string& kind, int threads, double megabytes);  // machine_peak.cpp
void layer_norm_lstm_gates(const std::string& kind, int64_t hidden_size, int64_t batch, int64_t steps,
                           bool backward);  // layer_norm_lstm.cpp

PYBIND11_MODULE(_C, m) {
  m.def("compiler", [] { return __VERSION__; });
  m.def("cpu_capability", [] { return ISA_NAMES[int(current_isa.load())]; });
  m.def("cpu_capabilities", [] { return std::vector<std::string>(ISA_NAMES, ISA_NAMES + int(best_isa()) + 1); });
  // For tests: run the kernels of a lesser ISA than the machine's own.
  m.def("set_cpu_capability", [](const std::string& name) {
    for (int isa = 0; isa <= int(best_isa()); ++isa)
      if (name == ISA_NAMES[isa]) return current_isa.store(Isa(isa));
    throw std::invalid_argument("this machine has no CPU capability '" + name + "'; its best is '" +
                                ISA_NAMES[int(best_isa())] + "'");
  });
  // For fastvae.models.weight_cache: of a tensor's memory.
  m.def("checksum", checksum, py::arg("address"), py::arg("bytes"), py::call_guard<py::gil_scoped_release>());
  // For benchmarks: what their shares of the machine's limits are shares of.
  m.def("machine_peak", machine_peak, py::arg("kind"), py::arg("threads"), py::arg("megabytes") = 0.0,
        py::call_guard<py::gil_scoped_release>());
  m.def("layer_norm_lstm_gates", layer_norm_lstm_gates, py::arg("kind"), py::arg("hidden_size"), py::arg("batch"),
        py::arg("steps"), py::arg("backward"), py::call_guard<py::gil_scoped_release>());
}
