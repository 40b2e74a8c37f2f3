// The Python side: tensors are checked when they are taken, and read by their addresses from then on. What is called
// for each token gets addresses alone: whoever calls sees to it that they are of contiguous tensors on the CPU.
#pragma once

#include <pybind11/pybind11.h>

#include <exception>
#include <memory>
#include <stdexcept>
#include <string>

#include "step.hpp"

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
      throw std::invalid_argument("a tensor of " + dtype + " is not allowed here, or not on the CPU, or not contiguous");
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

// Keys with or without lists.
class Index {
 public:
  Index(const py::object& codes, const py::object& step) : codes_(codes, KNNMOE_NUMBERS), step_(step, {"float32"}) {
    if (!step.is_none() && step_.rows != codes_.columns) throw std::invalid_argument("there is a step for each column");
    keys_ = {codes_.data, codes_.kind(), step_.as<float>(), codes_.rows, int(codes_.columns)};
  }

  // Sorts the keys into lists: see `knnmoe_hf.search.lists.Lists`.
  void look_into(const py::object& centroids, const py::object& step, const py::object& starts,
                 const py::object& rows, int64_t budget) {
    held_ = {Array(centroids, {"int8"}), Array(step, {"float32"}), Array(starts, {"int32"}), Array(rows, {"int32"})};
    lists_ = std::make_unique<Lists>(held_[0].as<int8_t>(), held_[1].as<float>(), held_[2].as<int32_t>(),
                                     held_[3].as<int32_t>(), held_[0].rows, keys_.width, budget);
  }

  // The k nearest of each of some queries, of at most `Lists::TOGETHER`.
  std::vector<Nearest> nearest(const float* queries, int count, size_t k) const {
    std::vector<Nearest> found;
    for (int query = 0; query < count; ++query) found.emplace_back(k);
    if (lists_)
      lists_->offer(queries, count, keys_, WIDER * k, found);
    else
      for (int query = 0; query < count; ++query)
        keys_.offer(queries + query * keys_.width, nullptr, keys_.rows, found[query]);
    return found;
  }

  std::vector<Found> nearest_of(const float* query, const int64_t* candidates, int64_t count, size_t k) const {
    for (int64_t i = 0; i < count; ++i)
      if (candidates[i] < 0 || candidates[i] >= keys_.rows) throw std::out_of_range("there is no such row");
    std::vector<int32_t> rows(candidates, candidates + count);
    Nearest found(std::min<size_t>(k, count));
    keys_.offer(query, rows.data(), count, found);
    return found.sorted();
  }

  // Fills distances (T, k) float32 and rows (T, k) int64 for queries (T, c) float32.
  void search(uintptr_t queries, int64_t count, int64_t k, uintptr_t distances, uintptr_t rows, int threads) const {
    py::gil_scoped_release others;
    std::exception_ptr failed;
    // PyTorch's own threads, where it runs on the same library: others would wait for these to leave their cores
#pragma omp parallel for num_threads(std::min<int64_t>(threads, count / PART + 1))
    for (int64_t first = 0; first < count; first += Lists::TOGETHER) {
      try {
        search_some((const float*)queries, first, count, k, (float*)distances, (int64_t*)rows);
      } catch (...) {
#pragma omp critical
        failed = std::current_exception();
      }
    }
    if (failed) std::rethrow_exception(failed);
  }

  int64_t bytes() const { return lists_ ? lists_->bytes() : 0; }
  int width() const { return keys_.width; }

 private:
  void search_some(const float* queries, int64_t first, int64_t count, int64_t k, float* distances,
                   int64_t* rows) const {
    const int some = std::min<int64_t>(Lists::TOGETHER, count - first);
    auto found = nearest(queries + first * keys_.width, some, k);
    for (int query = 0; query < some; ++query) {
      const std::vector<Found>& sorted = found[query].sorted();
      for (size_t i = 0; i < sorted.size(); ++i) {
        distances[(first + query) * k + i] = sorted[i].distance;
        rows[(first + query) * k + i] = sorted[i].row;
      }
    }
  }

  static constexpr int64_t PART = 16;  // queries that are worth a thread
  static constexpr int64_t WIDER = 4;  // keys to be searched for each one that is wanted, at least

  Array codes_, step_;
  Keys keys_;
  std::vector<Array> held_;
  std::unique_ptr<Lists> lists_;
};

// What a token recalls: how similar its neighbours are, and their mixed values (E,).
struct Recalled {
  double similar;
  std::vector<float> values;
};

// One token's way from a gate's input to what it recalls.
class Step {
 public:
  Step(std::shared_ptr<Index> index, const py::object& weight, const py::object& bias, int hidden,
       const py::object& codes, const py::object& experts, const py::object& rest, const py::object& step,
       const py::object& offset, int num_experts, int64_t k, double unit)
      : index_(std::move(index)), k_(k), unit_(unit) {
    held_ = {Array(weight, {"float32", "bfloat16"}), Array(bias, {"float32"}),  Array(codes, KNNMOE_NUMBERS),
             Array(experts, {"uint8", "int16"}),     Array(rest, {"float16"}),  Array(step, {"float32"}),
             Array(offset, {"float32"})};
    encoder_ = {held_[0].data, held_[0].kind(), held_[1].as<float>(), index_->width(), hidden};
    values_ = {held_[2].data,           held_[2].kind(),         held_[3].data,
               held_[3].dtype == "int16", held_[4].as<Half>(),   held_[5].as<float>(),
               held_[6].as<float>(),    int(held_[2].columns), num_experts};
  }

  // Fills query (c,) float32 from x (d,) float32, bfloat16 or float16.
  void encode(uintptr_t x, Kind kind, uintptr_t query) const {
    switch (kind) {
      case Kind::FLOAT32: return encoder_.query((const float*)x, (float*)query);
      case Kind::FLOAT16: return encoder_.query((const Half*)x, (float*)query);
      case Kind::BFLOAT16: return encoder_.query((const BFloat16*)x, (float*)query);
      case Kind::INT8: throw std::invalid_argument("gates have no inputs of int8");
    }
  }

  Recalled recall(uintptr_t x, Kind kind, double falloff) const {
    py::gil_scoped_release others;
    std::vector<float> query(index_->width());
    encode(x, kind, (uintptr_t)query.data());
    return mixed(index_->nearest(query.data(), 1, k_)[0].sorted(), falloff);
  }

  // The same for a query whose candidates are known.
  Recalled recall_of(uintptr_t query, uintptr_t candidates, int64_t count, double falloff) const {
    py::gil_scoped_release others;
    return mixed(index_->nearest_of((const float*)query, (const int64_t*)candidates, count, k_), falloff);
  }

  // Fills mixed (E,) in the kind of the logits (E,): see `knnmoe::mix`.
  void mix(const Recalled& recalled, float lambda, bool delta, uintptr_t logits, Kind kind, uintptr_t mixed) const {
    const float* values = recalled.values.data();
    const int experts = values_.num_experts;
    switch (kind) {
      case Kind::FLOAT32: return knnmoe::mix((const float*)logits, values, lambda, delta, experts, (float*)mixed);
      case Kind::FLOAT16: return knnmoe::mix((const Half*)logits, values, lambda, delta, experts, (Half*)mixed);
      case Kind::BFLOAT16:
        return knnmoe::mix((const BFloat16*)logits, values, lambda, delta, experts, (BFloat16*)mixed);
      case Kind::INT8: throw std::invalid_argument("gates have no logits of int8");
    }
  }

 private:
  Recalled mixed(const std::vector<Found>& found, double falloff) const {
    Recalled recalled{similarity(found, falloff), std::vector<float>(values_.num_experts)};
    values_.recall(found, neighbor_weights(found, unit_).data(), recalled.values.data());
    return recalled;
  }

  std::shared_ptr<Index> index_;
  std::vector<Array> held_;
  Encoder encoder_;
  Values values_;
  int64_t k_;
  double unit_;
};

}  // namespace

#define KNNMOE_MODULE(name) PYBIND11_MODULE(name, module)
KNNMOE_MODULE(KNNMOE_NAME) {
  py::enum_<Kind>(module, "Kind", py::module_local())
      .value("float32", Kind::FLOAT32)
      .value("float16", Kind::FLOAT16)
      .value("bfloat16", Kind::BFLOAT16);
  py::class_<Index, std::shared_ptr<Index>>(module, "Index", py::module_local())
      .def(py::init<const py::object&, const py::object&>())
      .def("look_into", &Index::look_into)
      .def("search", &Index::search)
      .def_property_readonly("bytes", &Index::bytes);
  py::class_<Recalled>(module, "Recalled", py::module_local())
      .def_readonly("similar", &Recalled::similar)
      .def("copy", [](const Recalled& recalled, uintptr_t into) {
        std::copy(recalled.values.begin(), recalled.values.end(), (float*)into);
      });
  py::class_<Step>(module, "Step", py::module_local())
      .def(py::init<std::shared_ptr<Index>, const py::object&, const py::object&, int, const py::object&,
                    const py::object&, const py::object&, const py::object&, const py::object&, int, int64_t, double>())
      .def("encode", &Step::encode)
      .def("recall", &Step::recall)
      .def("recall_of", &Step::recall_of)
      .def("mix", &Step::mix);
}
