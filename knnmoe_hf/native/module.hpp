// The Python side: tensors' dtypes and layout are checked when they are taken, their sizes by `CompiledRecall`, and they
// are read by their addresses from then on. What is called for each token gets addresses alone: whoever calls sees to it
// that they are of contiguous tensors on the CPU.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <exception>
#include <memory>
#include <string>

#include "recall.hpp"
#include "sums.hpp"

namespace py = pybind11;
using namespace knnmoe;

namespace {

// A tensor, kept for as long as it is read.
struct Array {
  py::object owner;
  const void* data = nullptr;
  std::string dtype;
  int64_t rows = 0, columns = 1;

  // None is no tensor; any other has one of these dtypes, is contiguous and on the CPU.
  Array(const py::object& tensor, std::initializer_list<const char*> dtypes) : owner(tensor) {
    if (tensor.is_none()) return;
    dtype = std::string(py::str(tensor.attr("dtype"))).substr(sizeof("torch.") - 1);
    const bool known = std::find(dtypes.begin(), dtypes.end(), dtype) != dtypes.end();
    if (!known || !tensor.attr("is_cpu").cast<bool>() || !tensor.attr("is_contiguous")().cast<bool>())
      throw std::invalid_argument("a tensor of " + dtype +
                                  " is not allowed here, or not on the CPU, or not contiguous");
    data = (const void*)tensor.attr("data_ptr")().cast<uintptr_t>();
    rows = tensor.attr("shape")[py::int_(0)].cast<int64_t>();
    if (tensor.attr("dim")().cast<int>() > 1) columns = tensor.attr("shape")[py::int_(1)].cast<int64_t>();
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

// Calls `use` with the first and the count of parts of so many tokens, and the room that a thread has made for itself.
template <class Make, class Use>
void in_parts(int64_t count, int threads, Make make, Use use) {
  constexpr int64_t WORTH = 16;  // tokens that are worth a thread
  std::exception_ptr failed;
  std::atomic<int64_t> next{0};
  // PyTorch's own threads, where it runs on the same library: a second pool would compete with them, as they spin on
#pragma omp parallel num_threads(std::min<int64_t>(threads, count / WORTH + 1))
  {
    try {
      auto room = make();
      for (int64_t first; (first = next.fetch_add(Lists::TOGETHER)) < count;)
        use(first, int(std::min<int64_t>(Lists::TOGETHER, count - first)), room);
    } catch (...) {
#pragma omp critical
      failed = std::current_exception();
    }
  }
  if (failed) std::rethrow_exception(failed);
}

// Room for the search of so many queries at once.
struct Search {
  std::vector<Nearest> nearest;
  Lists::Room lists;

  explicit Search(int queries) : nearest(queries), lists(queries) {}
};

// Writes the k nearest; an engine that has fewer is no engine.
inline void write(Nearest& nearest, size_t k, float* distances, int64_t* rows) {
  const std::vector<Found>& sorted = nearest.sorted();
  if (sorted.size() != k) throw std::length_error("fewer rows were found than are wanted");
  for (size_t i = 0; i < k; ++i) distances[i] = sorted[i].distance, rows[i] = sorted[i].row;
}

// Keys with or without lists.
class Index {
 public:
  Index(const py::object& codes, const py::object& step) : codes_(codes, KNNMOE_NUMBERS), step_(step, {"float32"}) {
    if (!step.is_none() && step_.rows != codes_.columns) throw std::invalid_argument("there is a step for each column");
    keys_ = {codes_.data, codes_.kind(), step_.as<float>(), codes_.rows, codes_.columns};
  }

  // Sorts the keys into lists: see `knnmoe_hf.search.lists.Lists`, and `knnmoe_hf.search.sketch.Sketch`, which may be
  // none.
  void look_into(const py::object& centroids, const py::object& step, const py::object& starts,
                 const py::object& rows, const py::object& codes, const py::object& units) {
    const Array own(centroids, {"int8"}), size(step, {"float32"}), begin(starts, {"int32"}), order(rows, {"int32"}),
        sketch(codes, {"uint8"}), unit(units, {"float32"});
    if (own.columns != keys_.width || size.rows != keys_.width || begin.rows != own.rows + 1 ||
        order.rows != keys_.rows)
      throw std::invalid_argument("these lists are not of these keys");
    const int64_t blocks = (keys_.rows + Sketch::BLOCK - 1) / Sketch::BLOCK;
    if (sketch.data && (sketch.rows != blocks || sketch.columns != (keys_.width + 1) / 2 * Sketch::BLOCK ||
                        unit.rows != own.rows))
      throw std::invalid_argument("this sketch is not of these lists");
    lists_ = std::make_unique<Lists>(own.as<int8_t>(), size.as<float>(), begin.as<int32_t>(), order.as<int32_t>(),
                                     own.rows, keys_.width,
                                     Sketch(sketch.as<uint8_t>(), unit.as<float>(), keys_.width));
    held_ = {own, size, begin, order, sketch, unit};
  }
  void set_reach(int64_t budget, int64_t chosen) {
    if (!lists_ || budget < 1 || chosen < 1) throw std::invalid_argument("a reach is of one key or more in lists: call look_into first");
    lists_->budget = budget, lists_->chosen = chosen;
  }

  // Fills distances (count, k) and rows (count, k) for as many queries as there is room for, or fewer.
  void search_some(const float* queries, int count, int64_t k, Search& room, float* distances, int64_t* rows) const {
    for (int query = 0; query < count; ++query) room.nearest[query].begin(k);
    if (lists_)
      lists_->offer(queries, count, keys_, WIDER * k, room.lists, room.nearest);
    else
      keys_.offer_all(queries, count, room.nearest);
    for (int query = 0; query < count; ++query)
      write(room.nearest[query], k, distances + query * k, rows + query * k);
  }

  // The same for any count of queries (T, c).
  void search(uintptr_t queries, int64_t count, int64_t k, uintptr_t distances, uintptr_t rows, int threads) const {
    py::gil_scoped_release others;
    const auto make = [] { return Search(Lists::TOGETHER); };
    in_parts(count, threads, make, [&](int64_t first, int some, Search& room) {
      search_some((const float*)queries + first * width(), some, k, room, (float*)distances + first * k,
                  (int64_t*)rows + first * k);
    });
  }

  // Fills distances (k,) and rows (k,) for one query from its candidates (count,).
  void search_among(const float* query, const int64_t* candidates, int64_t count, int64_t k, float* distances,
                    int64_t* rows) const {
    check_rows(candidates, count);
    Nearest nearest;
    nearest.begin(k);
    keys_.offer(query, candidates, count, nearest);
    write(nearest, k, distances, rows);
  }

  void check_rows(const int64_t* rows, int64_t count) const {
    for (int64_t i = 0; i < count; ++i)
      if (rows[i] < 0 || rows[i] >= keys_.rows) throw std::out_of_range("there is no such row");
  }
  int64_t bytes() const { return lists_ ? lists_->bytes() : 0; }
  int64_t width() const { return keys_.width; }

 private:
  static constexpr int64_t WIDER = 4;  // keys to be searched for each one that is wanted, at least

  Array codes_, step_;
  Keys keys_;
  std::vector<Array> held_;
  std::unique_ptr<Lists> lists_;
};

// What one token recalls: how similar its neighbours are, and their mixed values (E,).
struct Recalled {
  float similar;
  std::vector<float> values;
};

// Tokens' way from a gate's input to what they recall; each gets the same alone and among others.
class Recall {
 public:
  Recall(std::shared_ptr<Index> index, const py::object& weight, const py::object& bias, int64_t hidden,
         const py::object& codes, const py::object& experts, const py::object& rest, const py::object& step,
         const py::object& offset, int64_t num_experts, int64_t k, double unit)
      : index_(std::move(index)), hidden_(hidden), k_(k), unit_(unit) {
    held_ = {Array(weight, {"float32", "bfloat16"}), Array(bias, {"float32"}),  Array(codes, KNNMOE_NUMBERS),
             Array(experts, {"uint8", "int16"}),     Array(rest, {"float16"}),  Array(step, {"float32"}),
             Array(offset, {"float32"})};
    encoder_ = Encoder(held_[0].data, held_[0].kind(), held_[1].as<float>(), index_->width(), hidden);
    values_ = {held_[2].data,           held_[2].kind(),       held_[3].data,
               held_[3].dtype == "int16", held_[4].as<Half>(), held_[5].as<float>(),
               held_[6].as<float>(),    held_[2].columns,      num_experts};
  }

  // Fills queries (T, c) float32 from x (T, d) float32, bfloat16 or float16.
  void encode(uintptr_t x, int64_t count, Kind kind, uintptr_t queries, int threads) const {
    py::gil_scoped_release others;
    const auto make = [] { return std::vector<float>(); };
    in_parts(count, threads, make, [&](int64_t first, int some, std::vector<float>& source) {
      encode_some(x, first, some, kind, source, (float*)queries + first * index_->width());
    });
  }

  // Fills values (T, E) float32 for distances (T, k) float32 and rows (T, k) int64.
  void recall(uintptr_t distances, uintptr_t rows, int64_t count, int64_t k, uintptr_t values, int threads) const {
    py::gil_scoped_release others;
    index_->check_rows((const int64_t*)rows, count * k);
    const auto make = [&] { return std::vector<float>(k); };
    in_parts(count, threads, make, [&](int64_t first, int some, std::vector<float>& weights) {
      for (int64_t token = first; token < first + some; ++token) {
        neighbor_weights((const float*)distances + token * k, k, unit_, weights.data());
        values_.recall((const int64_t*)rows + token * k, weights.data(), k,
                       (float*)values + token * values_.num_experts);
      }
    });
  }

  // What one token (d,) recalls.
  Recalled recall_one(uintptr_t x, Kind kind, double falloff) const {
    py::gil_scoped_release others;
    static thread_local Search room(1);  // of all memories: a step of decoding allocates next to nothing
    static thread_local std::vector<float> source, query;
    query.resize(index_->width());
    encode_some(x, 0, 1, kind, source, query.data());
    return recalled(falloff, [&](float* distances, int64_t* rows) {
      index_->search_some(query.data(), 1, k_, room, distances, rows);
    });
  }

  // The same for a query whose candidates are known.
  Recalled recall_among(uintptr_t query, uintptr_t candidates, int64_t count, double falloff) const {
    py::gil_scoped_release others;
    return recalled(falloff, [&](float* distances, int64_t* rows) {
      index_->search_among((const float*)query, (const int64_t*)candidates, count, k_, distances, rows);
    });
  }

  // Fills mixed (E,) in the kind of the logits (E,): see `knnmoe::mix`.
  void mix(const Recalled& recalled, float lambda, bool delta, uintptr_t logits, Kind kind, uintptr_t mixed) const {
    typed((const void*)logits, kind, [&](auto* own) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(own)>>;
      if constexpr (!std::is_same_v<T, int8_t>)
        knnmoe::mix(own, recalled.values.data(), lambda, delta, values_.num_experts, (T*)mixed);
    });
  }

 private:
  void encode_some(uintptr_t x, int64_t first, int count, Kind kind, std::vector<float>& source,
                   float* queries) const {
    typed((const void*)x, kind, [&](auto* inputs) {
      encoder_.queries(inputs + first * hidden_, count, source, queries);
    });
  }

  template <class Find>
  Recalled recalled(double falloff, Find find) const {
    std::vector<float> distances(k_), weights(k_);
    std::vector<int64_t> rows(k_);
    find(distances.data(), rows.data());
    Recalled recalled{float(similarity(distances.data(), k_, falloff)), std::vector<float>(values_.num_experts)};
    neighbor_weights(distances.data(), k_, unit_, weights.data());
    values_.recall(rows.data(), weights.data(), k_, recalled.values.data());
    return recalled;
  }

  std::shared_ptr<Index> index_;
  std::vector<Array> held_;
  Encoder encoder_;
  Values values_;
  int64_t hidden_, k_;
  double unit_;
};

}  // namespace

#define KNNMOE_MODULE(name) PYBIND11_MODULE(name, module)
KNNMOE_MODULE(KNNMOE_NAME) {
#if defined(__AVX512VNNI__)  // PyTorch calls every processor with AVX512F by one name; not all of them have this
  if (!__builtin_cpu_supports("avx512vnni")) throw py::import_error("this processor has no AVX512 VNNI");
#endif
  py::enum_<Kind>(module, "Kind", py::module_local())
      .value("float32", Kind::FLOAT32)
      .value("float16", Kind::FLOAT16)
      .value("bfloat16", Kind::BFLOAT16);
  module.def("running_sums", [](uintptr_t values, uintptr_t gain, int64_t rows, int64_t length, uintptr_t sums) {
    running_sums((const float*)values, (const float*)gain, rows, length, (float*)sums);
  });
  py::class_<Index, std::shared_ptr<Index>>(module, "Index", py::module_local())
      .def(py::init<const py::object&, const py::object&>())
      .def("look_into", &Index::look_into)
      .def("set_reach", &Index::set_reach)
      .def("search", &Index::search)
      .def_property_readonly("bytes", &Index::bytes);
  py::class_<Recalled>(module, "Recalled", py::module_local())
      .def_readonly("similar", &Recalled::similar)
      .def("copy", [](const Recalled& recalled, uintptr_t into) {
        std::copy(recalled.values.begin(), recalled.values.end(), (float*)into);
      });
  const auto tensor = [](const char* name) { return py::arg(name) = py::none(); };
  py::class_<Recall>(module, "Recall", py::module_local())
      .def(py::init<std::shared_ptr<Index>, const py::object&, const py::object&, int64_t, const py::object&,
                    const py::object&, const py::object&, const py::object&, const py::object&, int64_t, int64_t,
                    double>(),
           py::kw_only(), py::arg("index"), tensor("weight"), tensor("bias"), py::arg("hidden"), py::arg("codes"),
           tensor("experts"), tensor("rest"), tensor("step"), tensor("offset"), py::arg("num_experts"), py::arg("k"),
           py::arg("unit"))
      .def("encode", &Recall::encode)
      .def("recall", &Recall::recall)
      .def("recall_one", &Recall::recall_one)
      .def("recall_among", &Recall::recall_among)
      .def("mix", &Recall::mix);
}
