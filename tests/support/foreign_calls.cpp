// Runs calls of the CPU kernels that another machine has written down: `foreign_calls IN OUT`, see foreign_machine.py.
//
// IN is made of 64-bit words: the number of blobs, for each its bytes, how many pointers are in it, and for each of these where it
// is and which blob it points to, then its contents, filled up to whole words; the number of calls, for each its name in 32 bytes,
// the number of arguments, and each as its kind and value. OUT is every blob as it is afterwards.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

struct Argument {
  enum Kind : int64_t { kInteger = 0, kReal = 1, kBlob = 2, kNull = 3 };
  int64_t kind, value;
  void* place;

  template <class T>
  T as() const {
    if constexpr (std::is_pointer_v<T>) {
      return static_cast<T>(place);
    } else if constexpr (std::is_floating_point_v<T>) {
      double number;
      memcpy(&number, &value, 8);
      return T(number);
    } else {
      return T(value);
    }
  }
};

template <class R, class... A, size_t... I>
static int64_t apply(R (*function)(A...), const std::vector<Argument>& given, std::index_sequence<I...>) {
  if constexpr (std::is_void_v<R>)
    return function(given[I].template as<A>()...), 0;
  else
    return function(given[I].template as<A>()...);
}

template <class R, class... A>
static int64_t call(R (*function)(A...), const std::vector<Argument>& given) {
  if (given.size() != sizeof...(A)) return -1;
  return apply(function, given, std::index_sequence_for<A...>());
}

typedef void* P;
extern "C" {
void dt_set_threads(int);
void dt_rms_norm(P, P, P, float, float, int, int, int, P, P);
void dt_gated(P, P, int, int, int, int, P);
void dt_rotate(P, P, P, int, int, int, int, int, P);
int dt_rope_write(P);
int dt_linear(P, int, P, int, P);
int dt_gated_linear(P, int, P, P, int, int, P);
int dt_token_losses(P, P, int, int64_t, float, int, P, P);
int dt_logit_gradients(P, P, P, P, int, int64_t, float, int);
void dt_sample(P, int, int, P, P, P, P, P, P);
int dt_attend(P, P, P, P, P, P, P, int64_t, int64_t, int64_t, int64_t, int64_t, double, double, int64_t, int64_t, int64_t, P, P, P,
              int64_t, P, P);
}

static int64_t call(const std::string& name, const std::vector<Argument>& given) {
#define FUNCTION(f) \
  if (name == #f) return call(f, given);
  FUNCTION(dt_set_threads)
  FUNCTION(dt_rms_norm)
  FUNCTION(dt_gated)
  FUNCTION(dt_rotate)
  FUNCTION(dt_rope_write)
  FUNCTION(dt_linear)
  FUNCTION(dt_gated_linear)
  FUNCTION(dt_token_losses)
  FUNCTION(dt_logit_gradients)
  FUNCTION(dt_sample)
  FUNCTION(dt_attend)
#undef FUNCTION
  return -1;
}

static FILE* in;

static int64_t word() {
  int64_t value;
  if (fread(&value, 8, 1, in) != 1) exit(2);
  return value;
}

int main(int, char** names) {
  in = fopen(names[1], "rb");
  if (!in) return 2;
  struct Pointer {
    char* place;
    int64_t to;
  };
  std::vector<std::vector<int64_t>> blobs(word());
  std::vector<Pointer> pointers;
  for (auto& blob : blobs) {
    blob.resize((word() + 7) / 8);
    for (int64_t left = word(); left > 0; left--) {
      char* place = reinterpret_cast<char*>(blob.data()) + word();
      pointers.push_back({place, word()});
    }
    if (fread(blob.data(), 8, blob.size(), in) != blob.size()) return 2;
  }
  for (const Pointer& pointer : pointers) {
    void* to = blobs[pointer.to].data();
    memcpy(pointer.place, &to, 8);
  }
  for (int64_t left = word(); left > 0; left--) {
    char name[33] = {};
    if (fread(name, 1, 32, in) != 32) return 2;
    std::vector<Argument> given(word());
    for (Argument& one : given) {
      one.kind = word();
      one.value = word();
      one.place = one.kind == Argument::kBlob ? blobs[one.value].data() : nullptr;
    }
    int64_t status = call(name, given);
    if (status != 0) {
      fprintf(stderr, "%s gave %lld\n", name, static_cast<long long>(status));
      return 3;
    }
  }
  FILE* out = fopen(names[2], "wb");
  for (const auto& blob : blobs)
    if (fwrite(blob.data(), 8, blob.size(), out) != blob.size()) return 2;
  return fclose(out) == 0 ? 0 : 2;
}
