// The emulated sums of four products of unsigned with signed bytes, against a loop: random bytes and extreme ones.
#include <cstdio>
#include <random>

#include SIMD_HEADER

int main() {
  using healthgpt::Simd;
  constexpr int kBytes = 4 * Simd::kLanes;
  constexpr uint8_t extremes[] = {0, 1, 127, 128, 255};
  std::mt19937 random_bits(0);
  const auto draw = [&](int round) {
    return static_cast<uint8_t>(round % 2 == 0 ? random_bits() : extremes[random_bits() % 5]);
  };
  for (int round = 0; round < 20000; ++round) {
    uint8_t unsigned_bytes[kBytes], signed_bytes[kBytes];
    int32_t sums[Simd::kLanes], found[2][Simd::kLanes];
    for (int i = 0; i < kBytes; ++i) {
      unsigned_bytes[i] = draw(round);
      signed_bytes[i] = draw(round);
    }
    for (int32_t& sum : sums) sum = static_cast<int32_t>(random_bits()) / 2;  // far from overflow, of either sign
    const Simd::Bytes weights = Simd::LoadBytes(unsigned_bytes), x = Simd::LoadBytes(signed_bytes);
    Simd::StoreInts(found[0], Simd::Dot4(Simd::LoadInts(sums), weights, x));
    Simd::StoreInts(found[1], Simd::Dot8(Simd::LoadInts(sums), weights, x));
    for (int i = 0; i < kBytes; ++i) sums[i / 4] += unsigned_bytes[i] * static_cast<int8_t>(signed_bytes[i]);
    for (int i = 0; i < Simd::kLanes; ++i) {
      if (found[0][i] == sums[i] && found[1][i] == sums[i]) continue;
      std::printf("round %d, lane %d: %d and %d for %d\n", round, i, found[0][i], found[1][i], sums[i]);
      return 1;
    }
  }
  return 0;
}
