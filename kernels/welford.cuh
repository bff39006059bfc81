// Mean and variance of one channel, in pieces that can be joined (Welford 1962; Chan, Golub and LeVeque 1979).
//
// Means are kept as differences from the channel's pivot, its first element: so a constant channel has mean 0 and
// variance 0 exactly, and a mean that is large for the deviation costs no digits.
//
// A thread carries the variance, not the sum of squares, because that overflows long before the variance does.
#pragma once
#include "tensor.cuh"

struct Moments {
  Real mean, variance;
};

DEVICE bool is_finite(Real x) { return x - x == Real(0); }

// The difference of two pieces' means decides their common variance. The weights are the pieces' shares of the count.
// An infinite mean stays infinite: infinity plus a difference of infinities would be NaN.
DEVICE Moments merge(const Moments& a, const Moments& b, Real weight_a, Real weight_b) {
  const Real delta = b.mean - a.mean;
  Moments both;
  both.mean = is_finite(a.mean) ? fma_rn(delta, weight_b, a.mean) : a.mean + b.mean;
  both.variance = fma_rn(delta * weight_a, delta * weight_b, fma_rn(b.variance, weight_b, a.variance * weight_a));
  return both;
}

struct Welford {
  enum { WEIGHTED = 1 };  // the count goes where the state is put down

  u64 count;
  Moments moments;

  DEVICE static Welford empty() {
    const Welford nothing = {0, {Real(0), Real(0)}};
    return nothing;
  }

  DEVICE static Welford merge(const Welford& a, const Welford& b) {
    if (b.count == 0) return a;
    if (a.count == 0) return b;
    const u64 count = a.count + b.count;
    const Real weight_a = divide_rn((Real)a.count, (Real)count);
    const Real weight_b = divide_rn((Real)b.count, (Real)count);
    const Welford both = {count, ::merge(a.moments, b.moments, weight_a, weight_b)};
    return both;
  }

  DEVICE Welford shuffled(int lanes) const {
    const Welford other = {shuffle_xor(count, lanes),
                           {shuffle_xor(moments.mean, lanes), shuffle_xor(moments.variance, lanes)}};
    return other;
  }

  struct Joined;

  DEVICE u64 weight() const { return count; }
  DEVICE Real first() const { return moments.mean; }
  DEVICE Real second() const { return moments.variance; }
  DEVICE static Welford from(u64 weight, Real first, Real second) {
    const Welford state = {weight, {first, second}};
    return state;
  }
};

// Any number of pieces in single precision are joined without a division for each: by their weighted sum and sum of
// squares in double precision. It has more than twice the digits: what cancels costs less than the pieces' own
// rounding, and nothing overflows.
struct WeightedSums {
  u64 count;
  double sum, squares;

  DEVICE WeightedSums() : count(0), sum(0.0), squares(0.0) {}

  DEVICE void add(const Welford& piece) {
    const double weight = (double)piece.count, mean = (double)piece.moments.mean;
    count += piece.count;
    sum = fma_rn(weight, mean, sum);
    squares = fma_rn(weight, fma_rn(mean, mean, (double)piece.moments.variance), squares);
  }

  DEVICE void add_shuffled(int lanes) {
    count += shuffle_xor(count, lanes);
    sum = sum + shuffle_xor(sum, lanes);
    squares = squares + shuffle_xor(squares, lanes);
  }

  DEVICE Welford total() const {
    if (count == 0) return Welford::empty();
    const double values = (double)count, mean = divide_rn(sum, values);
    const double variance = fma_rn(-mean, mean, divide_rn(squares, values));
    // Rounding may leave less than nothing of a variance of 0.
    const Welford all = {count, {(Real)mean, variance < 0.0 ? Real(0) : (Real)variance}};
    return all;
  }
};

// In double precision, one by one.
struct Merged {
  Welford state;

  DEVICE Merged() : state(Welford::empty()) {}
  DEVICE void add(const Welford& piece) { state = Welford::merge(state, piece); }
  // The lower lane's state is always the left one.
  DEVICE void add_shuffled(int lanes) {
    const Welford other = state.shuffled(lanes);
    state = threadIdx.x & lanes ? Welford::merge(other, state) : Welford::merge(state, other);
  }
  DEVICE Welford total() const { return state; }
};

template <int BYTES>
struct JoinedIn : WeightedSums {};
template <>
struct JoinedIn<8> : Merged {};

struct Welford::Joined : JoinedIn<(int)sizeof(Real)> {};

// What a channel's values are measured from: its first element, unless that would make every difference NaN.
DEVICE Real pivot_of(Real first_element) { return is_finite(first_element) ? first_element : Real(0); }

DEVICE Real inverse_deviation(Real variance, Real eps) { return divide_rn(Real(1), sqrt_rn(variance + eps)); }

// Of a batch: as in PyTorch it is 0 where variance and eps are, so that a constant channel gives the bias without an
// eps too.
DEVICE Real batch_inverse_deviation(Real variance, Real eps) {
  return variance + eps == Real(0) ? Real(0) : inverse_deviation(variance, eps);
}
