// The key of a draw that changes exactly when W changes: its stream takes the exclusive or of a hash of W. The formulas
// are in backends/reference/redraw_key.py.
//
// W is 32-bit words in logical order: an element of 2 or 4 bytes is one, one of 8 bytes two, the low half first.
// Version 2's hash is a sum over words, so that they are read in the order that they have in memory.
#pragma once

#include "feedback.h"

namespace bioplaus {

constexpr int kWordDims = 2 + kMaxColumnDims;
constexpr uint64_t kGamma = 0x9E3779B97F4A7C15u;
constexpr uint32_t kWordFactor = 0xD2511F53u;
constexpr int kRedrawSamples = 64;  // of version 1

struct RedrawParams {
  const void* data;
  const int64_t* key;
  int64_t words;
  int32_t bytes;  // of a word in memory: 2 or 4
  int32_t parts;  // words of an element
  // Dims, the one whose words are nearest in memory first; strides in memory and in logical order.
  int32_t dims;
  int64_t size[kWordDims], stride[kWordDims], step[kWordDims];
};

BK_INLINE uint64_t splitmix64(uint64_t z) {
  z += kGamma;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}

// What word x adds to the sum, `weyl` being K + (its index)·kGamma.
BK_INLINE uint64_t word_hash(uint64_t weyl, uint32_t x) {
  const uint64_t z = weyl ^ uint64_t{x} * kWordFactor;
  // The product alone would miss a change of one half where the other is 0, and is a polynomial of the index between
  // carries, whose differences at corners of a rectangle are equal.
  return (z & 0xFFFFFFFFu) * (z >> 32) ^ (z << 32 | z >> 32);
}

BK_INLINE uint64_t hash_start(const int64_t* key) { return splitmix64(static_cast<uint64_t>(key[1])); }

// `sum` is that of all words.
BK_INLINE uint64_t hash_end(const int64_t* key, uint64_t sum) { return splitmix64(hash_start(key) + sum); }

BK_INLINE uint32_t read_word(const RedrawParams& p, int64_t offset) {
  return p.bytes == 2 ? static_cast<const uint16_t*>(p.data)[offset] : static_cast<const uint32_t*>(p.data)[offset];
}

// Where word `position` in the order of the dims lies, and which it is in logical order.
struct WordPlace {
  int64_t offset, index;
};

BK_INLINE WordPlace word_place(const RedrawParams& p, int64_t position) {
  WordPlace at{0, 0};
  // The last needs no division, which is the only one where W is dense.
  const int last = p.dims - 1;
  for (int d = 0; d < last; ++d) {
    at.offset += position % p.size[d] * p.stride[d];
    at.index += position % p.size[d] * p.step[d];
    position /= p.size[d];
  }
  at.offset += position * p.stride[last];
  at.index += position * p.step[last];
  return at;
}

// Version 1: one of 64 evenly spread elements, by one Philox call under the layer's own key.
BK_INLINE uint64_t sample_hash(const RedrawParams& p, int k) {
  // k·elements / 64 without overflow.
  const int64_t elements = p.words / p.parts;
  const int64_t first = (elements / kRedrawSamples * k + elements % kRedrawSamples * k / kRedrawSamples) * p.parts;
  uint32_t word[2] = {0, 0};
  for (int part = 0; part < p.parts; ++part) {
    int64_t offset = 0;
    for (int d = 0; d < p.dims; ++d) {
      offset += (first + part) / p.step[d] % p.size[d] * p.stride[d];
    }
    word[part] = read_word(p, offset);
  }
  const Key key = read_key(p.key);
  const Philox4 x = philox4x32_10(word[0], word[1], static_cast<uint32_t>(k), 0x42525346u, key.k0, key.k1);
  return x.w[0] | static_cast<uint64_t>(x.w[1]) << 32;
}

}  // namespace bioplaus
