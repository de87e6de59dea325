// Recurrent layers: the loop over time of torch.nn's RNN, LSTM and GRU, one layer in one direction, in ATen's own
// operators, so that it is the same on every device. The input's product is made before it, of all steps at once; in
// the loop are the hidden state's product and what is pointwise. A packed sequence is the same loop over steps of fewer
// rows.
//
// The backward forms what multiplies each gate's gradient for all steps at once, before its loop, which is left with
// one product, by B in the weight's place, and three or four pointwise operators a step. The weights' gradients are one
// product each after it. What is pointwise in an LSTM is one pass on the CPU, where calls of nine operators a step are
// as long as its product in small layers; products there are those of cpu/step_product.h.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "cpu/lstm.h"
#include "cpu/step_product.h"

namespace bioplaus {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

enum class Mode { Tanh, Relu, Lstm, Gru };

Mode to_mode(c10::string_view mode) {
  if (mode == "RNN_TANH") {
    return Mode::Tanh;
  }
  if (mode == "RNN_RELU") {
    return Mode::Relu;
  }
  if (mode == "LSTM") {
    return Mode::Lstm;
  }
  TORCH_CHECK_VALUE(mode == "GRU", "mode: expected one of RNN_TANH, RNN_RELU, LSTM, GRU, got '", mode, "'");
  return Mode::Gru;
}

// The rows of a step, in a matrix of all steps' rows.
struct Step {
  int64_t start;
  int64_t rows;
};

// Shapes that fit each other, and the steps in the order in which the state goes through them.
class Layer {
 public:
  Layer(const char* name, const Tensor& like, const Tensor& hidden, const Optional& cell, const Optional& projection,
        const Optional& batch_sizes, c10::string_view mode_name, bool reverse)
      : name_(name), like_(like), reverse_(reverse) {
    mode = to_mode(mode_name);
    dims_ = batch_sizes ? 2 : 3;
    TORCH_CHECK_VALUE(hidden.dim() == 2, "hidden: expected 2 dimensions, got shape ", tuple(hidden.sizes()));
    batch = hidden.size(0);
    outputs = units = hidden.size(1);
    if (projection) {
      TORCH_CHECK_VALUE(mode == Mode::Lstm, "projection: expected None with mode='", mode_name, "', got a tensor");
      TORCH_CHECK_VALUE(projection->dim() == 2, "projection: expected 2 dimensions, got shape ",
                        tuple(projection->sizes()));
      units = projection->size(1);
    }
    TORCH_CHECK_VALUE(cell.has_value() == (mode == Mode::Lstm), "cell: expected ",
                      mode == Mode::Lstm ? "a tensor" : "None", " with mode='", mode_name, "', got ",
                      cell ? "a tensor" : "None");
    width = units * (mode == Mode::Lstm ? 4 : mode == Mode::Gru ? 3 : 1);
    check("hidden", hidden, {batch, outputs});
    check("cell", cell, {batch, units});
    check("projection", projection, {outputs, units});
    make_steps(batch_sizes);
  }

  Mode mode;
  int64_t batch, units, outputs, width, rows = 0;
  std::vector<Step> steps;

  void check(const char* name, const Tensor& x, at::IntArrayRef size) const {
    TORCH_CHECK_TYPE(x.scalar_type() == like_.scalar_type(), name, ": expected ", dtype_name(like_.scalar_type()),
                     ", got ", dtype_name(x.scalar_type()));
    TORCH_CHECK_VALUE(x.sizes().equals(size), name, ": expected shape ", tuple(size), ", got ", tuple(x.sizes()));
    check_device(name, x, like_.device());
  }
  void check(const char* name, const Optional& x, at::IntArrayRef size) const {
    if (x) {
      check(name, *x, size);
    }
  }
  // `columns` for each row of the input, in the input's leading dimensions.
  std::vector<int64_t> like_input(std::initializer_list<int64_t> columns) const {
    std::vector<int64_t> size(like_.sizes().begin(), like_.sizes().end() - 1);
    size.insert(size.end(), columns);
    return size;
  }
  Tensor matrix(const Tensor& x) const { return x.reshape({rows, x.size(-1)}); }

  // What each row's step started from: the state of the step before, or the initial one where that has no such row.
  Tensor before(const Tensor& states, const Tensor& initial) const {
    std::vector<Tensor> pieces;
    const size_t count = steps.size();
    for (size_t i = 0; i < count; ++i) {
      const size_t k = reverse_ ? count - 1 - i : i;
      const int64_t known = k > 0 ? std::min(steps[k - 1].rows, steps[k].rows) : 0;
      if (known > 0) {
        pieces.push_back(states.narrow(0, steps[k - 1].start, known));
      }
      if (known < steps[k].rows) {
        pieces.push_back(initial.narrow(0, known, steps[k].rows - known));
      }
    }
    return pieces.empty() ? at::empty_like(states) : at::cat(pieces);
  }

 private:
  void make_steps(const Optional& batch_sizes) {
    to_dtype(name_, like_.scalar_type());
    check_memory(name_, like_);
    TORCH_CHECK_VALUE(like_.dim() == dims_, name_, ": expected ", dims_, " dimensions, got shape ",
                      tuple(like_.sizes()));
    if (batch_sizes) {
      const Tensor& sizes = *batch_sizes;
      TORCH_CHECK_TYPE(sizes.scalar_type() == at::kLong, "batch_sizes: expected int64, got ",
                       dtype_name(sizes.scalar_type()));
      TORCH_CHECK_VALUE(sizes.dim() == 1 && sizes.is_cpu(), "batch_sizes: expected 1 dimension on cpu, got shape ",
                        tuple(sizes.sizes()), " on ", sizes.device());
      check_memory("batch_sizes", sizes);
      const Tensor dense = sizes.contiguous();
      int64_t most = batch;
      for (int64_t t = 0; t < dense.numel(); ++t) {
        const int64_t count = dense.const_data_ptr<int64_t>()[t];
        TORCH_CHECK_VALUE(count > 0 && (t > 0 ? count <= most : count == most),
                          "batch_sizes: expected positive integers that do not grow, from the ", batch,
                          " of hidden on, got ", count, " at ", t);
        most = count;
        steps.push_back({rows, count});
        rows += count;
      }
      TORCH_CHECK_VALUE(rows == like_.size(0), "batch_sizes: expected a sum of ", like_.size(0),
                        ", the input's rows, got ", rows);
    } else {
      TORCH_CHECK_VALUE(like_.size(1) == batch, "hidden: expected shape (", like_.size(1), ", ", outputs,
                        "), the input's batch first, got (", batch, ", ", outputs, ")");
      for (int64_t t = 0; t < like_.size(0); ++t, rows += batch) {
        steps.push_back({rows, batch});
      }
    }
    if (reverse_) {
      std::reverse(steps.begin(), steps.end());
    }
  }

  const char* name_;
  const Tensor& like_;
  bool reverse_;
  int64_t dims_;
};

// The first `rows` of x, which are all of it in most steps.
Tensor first(const Tensor& x, int64_t rows) { return rows == x.size(0) ? x : x.narrow(0, 0, rows); }

// The state of every sequence so far; where all of them take a step, that step's rows of the output themselves.
class Running {
 public:
  explicit Running(const Optional& initial) : value_(initial.value_or(Tensor())) {}
  Tensor of(int64_t rows) const { return first(value_, rows); }
  void set(const Tensor& now) {
    if (now.size(0) == value_.size(0)) {
      value_ = now;
      owned_ = false;
      return;
    }
    if (!owned_) {
      value_ = value_.clone();
      owned_ = true;
    }
    of(now.size(0)).copy_(now);
  }
  Tensor whole() const { return owned_ ? value_ : value_.clone(); }

 private:
  Tensor value_;
  bool owned_ = false;
};

// Operands have been cast, and autograd is outside.
struct Plain {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

// Fewer units than this are not worth a second thread.
constexpr int64_t kGrain = 4096;

// Calls f with the element of csrc/cpu/lstm_kernel.cpp's pass for `dtype`.
template <typename F>
void with_element(at::ScalarType dtype, const F& f) {
  switch (dtype) {
    case at::kFloat:
      return f(float());
    case at::kDouble:
      return f(double());
    case at::kBFloat16:
      return f(BF16());
    default:
      TORCH_INTERNAL_ASSERT(dtype == at::kHalf);
      return f(FP16());
  }
}

template <typename T>
const T* from(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <typename T>
T* to(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

template <typename Params>
void over_rows(int64_t rows, const Params& p) {
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, p.units)),
                   [&](int64_t begin, int64_t end) { BK_PICK(lstm_step<Params>)(p, begin, end); });
}

// Of a step's sums g (rows, 4 units) the gates, in place, of the state `before` the next, c, and o tanh(c). All are
// contiguous.
void lstm_step(const Tensor& g, const Tensor& before, const Tensor& c, const Tensor& out) {
  const int64_t u = c.size(1);
  if (g.is_cpu()) {
    with_element(g.scalar_type(), [&]<typename T>(T) {
      over_rows(g.size(0), LstmStep<T>{u, to<T>(g), from<T>(before), to<T>(c), to<T>(out)});
    });
    return;
  }
  g.narrow(1, 0, 2 * u).sigmoid_();
  const Tensor proposed = g.narrow(1, 2 * u, u).tanh_(), open = g.narrow(1, 3 * u, u).sigmoid_();
  Tensor to_c = c, to_out = out;
  at::mul_out(to_c, g.narrow(1, u, u), before);
  to_c.addcmul_(g.narrow(1, 0, u), proposed);
  at::tanh_out(to_out, c);
  to_out.mul_(open);
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Forward recurrent_forward(const Tensor& input, const Tensor& hidden, const Optional& cell, const Tensor& weight,
                          const Optional& bias, const Optional& projection, const Optional& batch_sizes,
                          c10::string_view mode, bool reverse) {
  const Plain plain;
  const Layer l("input", input, hidden, cell, projection, batch_sizes, mode, reverse);
  l.check("input", input, l.like_input({l.width}));
  l.check("weight", weight, {l.width, l.outputs});
  l.check("bias", bias, {l.width});

  const int64_t u = l.units;
  const bool lstm = l.mode == Mode::Lstm, gru = l.mode == Mode::Gru;
  const auto fresh = [&](int64_t columns) { return at::empty({l.rows, columns}, input.options()); };
  const auto none = [&] { return at::empty({0}, input.options()); };
  const Tensor x = l.matrix(input);
  const StepProduct by_weight(weight.t(), l.batch, l.rows);
  const StepProduct by_projection(projection ? projection->t() : none(), l.batch, l.rows);
  Tensor output = fresh(l.outputs), gates = none(), cells = none(), product;
  if (gru) {
    gates = fresh(4 * u);
    product = at::empty({l.batch, l.width}, input.options());
  } else {
    gates = fresh(l.width);
    if (bias) {
      at::add_out(gates, x, *bias);
    } else {
      gates.copy_(x);
    }
  }
  if (lstm) {
    cells = fresh(u);
  }
  Running state(hidden), memory(cell ? cell->contiguous() : cell);
  for (const auto [start, rows] : l.steps) {
    const Tensor h = state.of(rows), g = gates.narrow(0, start, rows);
    Tensor out = output.narrow(0, start, rows);
    if (lstm) {
      by_weight.run(g, h, g);
      const Tensor c = cells.narrow(0, start, rows), inner = projection ? at::empty_like(c) : out;
      lstm_step(g, memory.of(rows), c, inner);
      memory.set(c);
      if (projection) {
        by_projection.run(out, inner);
      }
    } else if (gru) {
      Tensor p = product.narrow(0, 0, rows), rz = g.narrow(1, 0, 2 * u), n = g.narrow(1, 2 * u, u);
      by_weight.run(p, h, bias.value_or(Tensor()));
      const Tensor from_x = x.narrow(0, start, rows), from_h = p.narrow(1, 2 * u, u);
      at::add_out(rz, from_x.narrow(1, 0, 2 * u), p.narrow(1, 0, 2 * u));
      rz.sigmoid_();
      g.narrow(1, 3 * u, u).copy_(from_h);
      at::addcmul_out(n, from_x.narrow(1, 2 * u, u), rz.narrow(1, 0, u), from_h);
      n.tanh_();
      at::lerp_out(out, n, h, rz.narrow(1, u, u));
    } else {
      by_weight.run(out, h, g);
      l.mode == Mode::Tanh ? out.tanh_() : out.relu_();
    }
    state.set(out);
  }
  if (!lstm && !gru) {
    gates = none();
  } else {
    gates = gates.view(l.like_input({4, u}));
  }
  return {output.view(l.like_input({l.outputs})), state.whole(), lstm ? memory.whole() : none(), gates,
          lstm ? cells.view(l.like_input({u})) : cells};
}

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Backward recurrent_backward(const Tensor& grad_output, const Tensor& grad_hidden, const Optional& grad_cell,
                            const Tensor& output, const Tensor& gates, const Tensor& cells, const Tensor& hidden,
                            const Optional& cell, const Optional& feedback, const Optional& projection,
                            const Optional& batch_sizes, c10::string_view mode, bool reverse,
                            const c10::List<bool>& wanted) {
  const Plain plain;
  const Layer l("output", output, hidden, cell, projection, batch_sizes, mode, reverse);
  const int64_t u = l.units;
  const bool lstm = l.mode == Mode::Lstm, gru = l.mode == Mode::Gru;
  l.check("output", output, l.like_input({l.outputs}));
  l.check("grad_output", grad_output, l.like_input({l.outputs}));
  l.check("grad_hidden", grad_hidden, {l.batch, l.outputs});
  l.check("grad_cell", grad_cell, {l.batch, u});
  l.check("feedback", feedback, {l.width, l.outputs});
  if (lstm || gru) {
    l.check("gates", gates, l.like_input({4, u}));
  }
  if (lstm) {
    l.check("cells", cells, l.like_input({u}));
    TORCH_CHECK_VALUE(grad_cell.has_value(), "grad_cell: expected a tensor with mode='LSTM', got None");
  }
  TORCH_CHECK_VALUE(wanted.size() == 3, "wanted: expected 3 of them, got ", wanted.size());

  const auto none = [&] { return at::empty({0}, output.options()); };
  const Tensor y = l.matrix(output), grads = l.matrix(grad_output);
  Tensor states = wanted[0] || gru ? l.before(y, hidden) : Tensor();
  Tensor dh = grad_hidden.clone(at::MemoryFormat::Contiguous), dc, c, c_before, forget, slope, dp;

  // What multiplies each gate's gradient, and then the gradients themselves. GRU's are n's of the hidden state, r, z
  // and n's of the input, so that the hidden state's and the input's lie together each.
  Tensor d = at::empty({l.rows, lstm || gru ? 4 : 1, u}, output.options());
  const bool one_pass = lstm && output.is_cpu();
  const Tensor g = lstm || gru ? gates.reshape({l.rows, 4, u}).contiguous() : Tensor();
  const auto gate = [&](int64_t k) { return g.select(1, k); };
  const auto factor = [&](int64_t k) { return d.select(1, k); };
  if (lstm) {
    dc = grad_cell->clone(at::MemoryFormat::Contiguous);
    c = l.matrix(cells).contiguous();
    c_before = l.before(c, *cell);
    if (!one_pass) {
      const Tensor squashed = at::tanh(c);
      Tensor to[] = {factor(0), factor(1), factor(2), factor(3)};
      at::sigmoid_backward_out(to[0], gate(2), gate(0));
      at::sigmoid_backward_out(to[1], c_before, gate(1));
      at::tanh_backward_out(to[2], gate(0), gate(2));
      at::sigmoid_backward_out(to[3], squashed, gate(3));
      forget = gate(1);
      slope = at::tanh_backward(gate(3), squashed);
    }
    if (projection) {
      dp = at::empty_like(grads, at::MemoryFormat::Contiguous);
    }
  } else if (gru) {
    Tensor to[] = {factor(0), factor(1), factor(2), factor(3)};
    forget = gate(1);
    at::tanh_backward_out(to[3], 1 - forget, gate(2));
    at::mul_out(to[0], to[3], gate(0));
    at::sigmoid_backward_out(to[1], gate(3), gate(0));
    to[1].mul_(to[3]);
    at::sigmoid_backward_out(to[2], states - gate(2), forget);
  } else if (l.mode == Mode::Tanh) {
    Tensor to = factor(0);
    at::tanh_backward_out(to, at::ones_like(y), y);
  } else {
    d.select(1, 0).copy_(y > 0);
  }

  // Rows of B in the order of GRU's gradients.
  const StepProduct by_feedback(feedback ? gru ? feedback->roll(u, 0) : *feedback : none(), l.batch, l.rows);
  const StepProduct by_projection(projection.value_or(none()), l.batch, l.rows);
  Tensor flat = d.view({l.rows, d.size(1) * u});
  for (auto step = l.steps.rbegin(); step != l.steps.rend(); ++step) {
    const auto [start, rows] = *step;
    Tensor dh_t = first(dh, rows);
    dh_t.add_(grads.narrow(0, start, rows));
    const Tensor all = flat.narrow(0, start, rows), h_part = gru ? all.narrow(1, 0, l.width) : all;
    const Tensor d_t = one_pass ? all : d.narrow(0, start, rows);
    if (lstm) {
      Tensor out = dh_t;
      if (projection) {
        dp.narrow(0, start, rows).copy_(dh_t);
        out = at::empty({rows, u}, output.options());
        by_projection.run(out, dh_t);
      }
      if (one_pass) {
        with_element(output.scalar_type(), [&, start = start, rows = rows]<typename T>(T) {
          const auto at = [&](const Tensor& x) { return from<T>(x) + start * x.stride(0); };
          over_rows(rows, LstmStepBack<T>{u, at(g), at(c_before), at(c), from<T>(out), to<T>(dc), to<T>(d_t)});
        });
      } else {
        Tensor dc_t = first(dc, rows);
        dc_t.addcmul_(out, slope.narrow(0, start, rows));
        d_t.narrow(1, 0, 3).mul_(dc_t.unsqueeze(1));
        d_t.select(1, 3).mul_(out);
        dc_t.mul_(forget.narrow(0, start, rows));
      }
    } else {
      d_t.mul_(dh_t.unsqueeze(1));
    }
    if (gru) {
      dh_t.mul_(forget.narrow(0, start, rows));
      if (feedback) {
        by_feedback.run(dh_t, h_part, dh_t);
      }
    } else if (feedback) {
      by_feedback.run(dh_t, h_part);
    } else {
      dh_t.zero_();
    }
  }

  Tensor grad_weight = none(), grad_bias = none(), grad_projection = none();
  const Tensor h_part = flat.narrow(1, 0, l.width);
  const auto in_order = [&](const Tensor& x) { return gru ? x.roll(-u, 0) : x; };
  if (wanted[0]) {
    grad_weight = in_order(h_part.t().mm(states));
  }
  if (wanted[1]) {
    grad_bias = in_order(h_part.sum(0));
  }
  if (wanted[2] && dp.defined()) {
    grad_projection = dp.t().mm(at::tanh(c).mul_(gate(3)));
  }
  const Tensor grad_input = gru ? flat.narrow(1, u, l.width).contiguous() : flat;
  return {grad_input.view(l.like_input({l.width})), dh, lstm ? dc : none(), grad_weight, grad_bias, grad_projection};
}

}  // namespace

TORCH_LIBRARY_IMPL(bioplaus, CPU, m) {
  m.impl("recurrent_forward", recurrent_forward);
  m.impl("recurrent_backward", recurrent_backward);
}

TORCH_LIBRARY_IMPL(bioplaus, CUDA, m) {
  m.impl("recurrent_forward", recurrent_forward);
  m.impl("recurrent_backward", recurrent_backward);
}

}  // namespace bioplaus
