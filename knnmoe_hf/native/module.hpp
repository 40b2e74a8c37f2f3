// The Python module. Constructors take tensors, check their dtypes, layout and sizes, and keep them alive. Methods that
// run for every token take addresses: the caller has checked them (`knnmoe_hf.native.address`).
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <exception>
#include <memory>
#include <string>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include "encoder.hpp"
#include "lists.hpp"
#include "next_tokens.hpp"
#include "values.hpp"

namespace py = pybind11;
using namespace knnmoe;

namespace {

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

// A tensor that is kept alive for as long as it is read; or None.
struct TensorView {
  py::object owner;
  const void* data = nullptr;
  std::string dtype;
  int64_t rows = 0, columns = 1;

  TensorView(const char* name, const py::object& tensor, int dimensions, std::initializer_list<const char*> dtypes)
      : owner(tensor) {
    if (tensor.is_none()) return;
    dtype = std::string(py::str(tensor.attr("dtype"))).substr(sizeof("torch.") - 1);
    const bool known = std::find(dtypes.begin(), dtypes.end(), dtype) != dtypes.end();
    const int given = tensor.attr("dim")().cast<int>();
    if (!known || given != dimensions || !tensor.attr("is_cpu").cast<bool>() ||
        !tensor.attr("is_contiguous")().cast<bool>()) {
      std::string allowed;
      for (const char* one : dtypes) allowed += (allowed.empty() ? "" : ", ") + std::string(one);
      refuse(std::string(name) + " of dtype " + dtype + " and " + std::to_string(given) + " dimensions on " +
             std::string(py::str(tensor.attr("device"))) + " is not allowed: pass a contiguous tensor on the CPU of " +
             std::to_string(dimensions) + " dimensions, in one of " + allowed);
    }
    data = (const void*)tensor.attr("data_ptr")().cast<uintptr_t>();
    rows = tensor.attr("shape")[py::int_(0)].cast<int64_t>();
    if (dimensions > 1) columns = tensor.attr("shape")[py::int_(1)].cast<int64_t>();
  }
  template <class T>
  const T* as() const {
    return (const T*)data;
  }
  Kind kind() const {
    if (dtype == "float16") return Kind::FLOAT16;
    if (dtype == "bfloat16") return Kind::BFLOAT16;
    return dtype == "int8" ? Kind::INT8 : Kind::FLOAT32;
  }
};

#define KNNMOE_NUMBERS {"float32", "float16", "bfloat16", "int8"}

std::atomic<bool> forked{false};

// A forked process has none of the threads of its parent's OpenMP pool, and waits for them for ever: it uses one thread.
void watch_forks() {
#if defined(__unix__) || defined(__APPLE__)
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif
}

// Calls `use(first, count)` for parts of `count` tokens. Results never depend on how tokens are grouped. The threads are
// PyTorch's own on Linux: a second pool would compete with it, as idle OpenMP threads spin for a while.
template <class Use>
void in_parts(int64_t count, int threads, Use use) {
  constexpr int64_t PART = Lists::BATCH, WORTH_A_THREAD = 16;
  const auto part = [&](int64_t first) { use(first, int(std::min(PART, count - first))); };
  const int team = forked ? 1 : int(std::min<int64_t>(threads, count / WORTH_A_THREAD + 1));
  if (team <= 1) {
    for (int64_t first = 0; first < count; first += PART) part(first);
    return;
  }
  std::exception_ptr failed;
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(team)
  {
    try {
      for (int64_t first; (first = next.fetch_add(PART)) < count;) part(first);
    } catch (...) {
#pragma omp critical
      failed = std::current_exception();
    }
  }
  if (failed) std::rethrow_exception(failed);
}

// Keys, searched exhaustively or through lists.
class Index {
 public:
  // codes (rows, width); step (width,) float32 for int8 codes that count steps, or None.
  Index(const py::object& codes, const py::object& step)
      : codes_("codes", codes, 2, KNNMOE_NUMBERS), step_("step", step, 1, {"float32"}) {
    if (codes.is_none() || codes_.columns < 1) refuse("an index needs keys of at least one dimension");
    if (step_.data && step_.rows != codes_.columns)
      refuse("step has " + std::to_string(step_.rows) + " numbers, but keys have " + std::to_string(codes_.columns) +
             " dimensions: give one step for each");
    keys_ = {codes_.data, codes_.kind(), step_.as<float>(), codes_.rows, codes_.columns};
  }

  // See `knnmoe_hf.search.lists.Lists` and `knnmoe_hf.search.residual_codes.ResidualCodes4bit`.
  void set_lists(const py::object& centroids, const py::object& step, const py::object& starts, const py::object& rows,
                 const py::object& residual_codes, const py::object& units) {
    const TensorView centroid("centroids", centroids, 2, {"int8"}), size("step", step, 1, {"float32"}),
        start("starts", starts, 1, {"int32"}), order("rows", rows, 1, {"int32"}),
        code("residual_codes", residual_codes, 2, {"uint8"}), unit("units", units, 1, {"float32"});
    if (!centroid.data || centroid.columns != keys_.width || size.rows != keys_.width ||
        start.rows != centroid.rows + 1 || order.rows != keys_.rows)
      refuse("these lists are not of these keys: give centroids (lists, width), step (width,), starts (lists + 1,) and "
             "rows (rows,)");
    const int64_t blocks = (keys_.rows + ResidualCodes::BLOCK - 1) / ResidualCodes::BLOCK;
    const int64_t block_bytes = (keys_.width + 1) / 2 * ResidualCodes::BLOCK;
    if (!code.data != !unit.data ||
        (code.data && (code.rows != blocks || code.columns != block_bytes || unit.rows != centroid.rows)))
      refuse("these residual codes are not of these lists: give residual_codes (ceil(rows / 16), 16 ceil(width / 2)) "
             "and units (lists,)");
    lists_ = std::make_unique<Lists>(centroid.as<int8_t>(), size.as<float>(), start.as<int32_t>(), order.as<int32_t>(),
                                     centroid.rows, keys_.width,
                                     ResidualCodes(code.as<uint8_t>(), unit.as<float>(), keys_.width));
    kept_ = {centroid, size, start, order, code, unit};
  }

  void set_scan(int64_t max_scan, int64_t max_rerank, int64_t tuned) {
    if (!lists_) refuse("set_scan is for an index with lists: call set_lists first");
    if (max_scan < 1 || max_rerank < 1 || tuned < 1) refuse("max_scan, max_rerank and tuned must be at least 1");
    lists_->max_scan = max_scan, lists_->max_rerank = max_rerank, lists_->tuned = tuned;
  }

  // Fills distances (count, k) float32 and rows (count, k) int64 for queries (count, width) float32. Each query gets the
  // same answer, to the bit, whatever is asked with it.
  void search(uintptr_t queries, int64_t count, int64_t k, uintptr_t distances, uintptr_t rows, int threads) const {
    if (k < 1 || k > keys_.rows)
      refuse(std::to_string(k) + " neighbours cannot be searched for among " + std::to_string(keys_.rows) +
             " keys: k must be from 1 to the number of keys");
    py::gil_scoped_release release;
    in_parts(count, threads, [&](int64_t first, int some) {
      search_batch((const float*)queries + first * keys_.width, some, k, (float*)distances + first * k,
                   (int64_t*)rows + first * k);
    });
  }

  int64_t bytes() const { return lists_ ? lists_->bytes() : 0; }

 private:
  struct Scratch {
    std::vector<TopK> top{size_t(Lists::BATCH)};
    Lists::Scratch lists;
    std::vector<float> key;
  };

  void search_batch(const float* queries, int count, int64_t k, float* distances, int64_t* rows) const {
    static thread_local Scratch scratch;  // shared by all indexes: a step of decoding allocates next to nothing
    for (int query = 0; query < count; ++query) scratch.top[query].reset(k);
    if (lists_)
      lists_->search(queries, count, keys_, k, scratch.lists, scratch.top);
    else
      keys_.compare_all(queries, count, scratch.key, scratch.top);
    for (int query = 0; query < count; ++query) {
      const std::vector<Neighbor>& sorted = scratch.top[query].sorted();
      if (int64_t(sorted.size()) != k) throw std::logic_error("the lists of an index hold fewer keys than k");
      for (int64_t i = 0; i < k; ++i) *distances++ = sorted[i].distance, *rows++ = sorted[i].row;
    }
  }

  TensorView codes_, step_;
  Keys keys_;
  std::vector<TensorView> kept_;
  std::unique_ptr<Lists> lists_;
};

// Queries of gate inputs.
class PyEncoder {
 public:
  // weight (width, hidden) float32 or bfloat16, bias (width,) float32; or None for the identity and for no bias.
  PyEncoder(const py::object& weight, const py::object& bias, int64_t width, int64_t hidden)
      : weight_("weight", weight, 2, {"float32", "bfloat16"}), bias_("bias", bias, 1, {"float32"}),
        encoder_(weight_.data, weight_.kind(), bias_.as<float>(), width, hidden), width_(width), hidden_(hidden) {
    if (width < 1 || hidden < 1) refuse("width and hidden must be at least 1");
    if (weight_.data ? weight_.rows != width || weight_.columns != hidden : width != hidden)
      refuse("weight must be (width, hidden), or None where width is hidden");
    if (bias_.data && bias_.rows != width) refuse("bias must be (width,)");
  }

  // Fills queries (count, width) float32 for x (count, hidden) of a kind.
  void encode(uintptr_t x, int64_t count, Kind kind, uintptr_t queries, int threads) const {
    py::gil_scoped_release release;
    in_parts(count, threads, [&](int64_t first, int some) {
      static thread_local std::vector<float> floats;
      with_type((const void*)x, kind, [&](auto* inputs) {
        encoder_.encode(inputs + first * hidden_, some, floats, (float*)queries + first * width_);
      });
    });
  }

 private:
  TensorView weight_, bias_;
  Encoder encoder_;
  int64_t width_, hidden_;
};

// Weighted sums of stored values.
class ValueTable {
 public:
  ValueTable(const py::object& codes, const py::object& experts, const py::object& default_value,
             const py::object& step, const py::object& offset, int64_t num_experts)
      : codes_("codes", codes, 2, KNNMOE_NUMBERS), experts_("experts", experts, 2, {"uint8", "int16"}),
        default_value_("default_value", default_value, 1, {"float16"}), step_("step", step, 1, {"float32"}),
        offset_("offset", offset, 1, {"float32"}) {
    const bool sparse = experts_.data;
    if (codes.is_none() || num_experts < 1 || (!sparse && codes_.columns != num_experts))
      refuse("codes must be (rows, num_experts), or (rows, stored) with experts");
    if (sparse && (experts_.rows != codes_.rows || experts_.columns != codes_.columns))
      refuse("experts must have the shape of codes");
    if (default_value_.data && (!sparse || default_value_.rows != codes_.rows))
      refuse("default_value must be (rows,), and needs experts");
    const int64_t columns = sparse ? 1 : num_experts;
    if (!step_.data != !offset_.data || (step_.data && (step_.rows != columns || offset_.rows != columns)))
      refuse("step and offset must both be given, of one number if there are experts, else of num_experts");
    values_ = {codes_.data, codes_.kind(), experts_.data, experts_.dtype == "int16", default_value_.as<Half>(),
               step_.as<float>(), offset_.as<float>(), codes_.rows, codes_.columns, num_experts};
  }

  // Fills values (count, num_experts) float32: of rows (count, k) int64, weighted by weights (count, k) float32.
  void combine(uintptr_t rows, uintptr_t weights, int64_t count, int64_t k, uintptr_t values, int threads) const {
    py::gil_scoped_release release;
    values_.check_rows((const int64_t*)rows, count * k);
    in_parts(count, threads, [&](int64_t first, int some) {
      for (int64_t token = first; token < first + some; ++token)
        values_.combine((const int64_t*)rows + token * k, (const float*)weights + token * k, k,
                        (float*)values + token * values_.num_experts);
    });
  }

 private:
  TensorView codes_, experts_, default_value_, step_, offset_;
  Values values_;
};

// Mixes the tokens that followed neighbours into outputs (count, columns) of a kind, of which the first `width` are those
// of the logits, in place: neighbours are distances (count, voters) float32 and rows (count, voters) int64; `confidences`
// are (count,) float32, or null if `confidence` is that of all. Tokens with a mixing weight of 0 keep their bits.
void mix_next_tokens(uintptr_t outputs, int64_t count, int64_t columns, Kind kind, int64_t width, float factor, float cap,
                     uintptr_t distances, uintptr_t rows, int64_t voters, uintptr_t confidences, float confidence,
                     uintptr_t next_tokens, int64_t num_rows, float unit, float scale, float weight, bool fitted,
                     int threads) {
  if (width < 1 || width > columns)
    refuse("the logits of " + std::to_string(columns) + " outputs cannot be " + std::to_string(width) +
           ": width must be from 1 to the number of outputs");
  const Voting voting{(const int32_t*)next_tokens, num_rows, voters, unit, scale, weight, fitted};
  py::gil_scoped_release release;
  in_parts(count, threads, [&](int64_t first, int some) {
    static thread_local RecalledTokens recalled;
    with_output((void*)outputs, kind, [&](auto* table) {
      for (int64_t token = first; token < first + some; ++token)
        recalled.mix(voting, confidences ? ((const float*)confidences)[token] : confidence,
                     (const float*)distances + token * voters, (const int64_t*)rows + token * voters,
                     table + token * columns, columns, width, {factor, cap});
    });
  });
}

}  // namespace

#define KNNMOE_MODULE(name) PYBIND11_MODULE(name, module)
KNNMOE_MODULE(KNNMOE_NAME) {
  watch_forks();
  py::enum_<Kind>(module, "Kind", py::module_local())
      .value("float32", Kind::FLOAT32)
      .value("float16", Kind::FLOAT16)
      .value("bfloat16", Kind::BFLOAT16);
  const auto optional = [](const char* name) { return py::arg(name) = py::none(); };
  py::class_<Index>(module, "Index", py::module_local())
      .def(py::init<const py::object&, const py::object&>(), py::arg("codes"), optional("step"))
      .def("set_lists", &Index::set_lists, py::arg("centroids"), py::arg("step"), py::arg("starts"), py::arg("rows"),
           optional("residual_codes"), optional("units"))
      .def("set_scan", &Index::set_scan, py::arg("max_scan"), py::arg("max_rerank"), py::arg("tuned"))
      .def("search", &Index::search)
      .def_property_readonly("bytes", &Index::bytes);
  py::class_<PyEncoder>(module, "Encoder", py::module_local())
      .def(py::init<const py::object&, const py::object&, int64_t, int64_t>(), py::arg("weight"), py::arg("bias"),
           py::arg("width"), py::arg("hidden"))
      .def("encode", &PyEncoder::encode);
  py::class_<ValueTable>(module, "ValueTable", py::module_local())
      .def(py::init<const py::object&, const py::object&, const py::object&, const py::object&, const py::object&,
                    int64_t>(),
           py::arg("codes"), optional("experts"), optional("default_value"), optional("step"), optional("offset"),
           py::arg("num_experts"))
      .def("combine", &ValueTable::combine);
  module.def("mix_next_tokens", &mix_next_tokens);
}
