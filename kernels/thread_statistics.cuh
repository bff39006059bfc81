// What one thread learns of mean and variance on its way through a task.
//
// It takes its vectors UNROLL at a time, so that as many loads are under way. From a centre near the mean it sums up
// the deviations of its values and their squares: a subtraction, an addition and a multiplication for each. After some
// such chunks the sums become a mean and a variance, which are joined to those before by Welford's rule.
//
// The squares of deviations from the centre are n (centre - mean)^2 more than those from the mean. It is taken off
// again, and would cost digits if it were large. It is not: the centre is the mean of a vector of the thread's first
// chunk, then of all chunks before; and where it is the mean of a share p of some values, whatever they are,
// (centre - mean)^2 is at most (1 - p) / p times their variance.
#pragma once
#include "normalise.cuh"
#include "welford.cuh"

// Whether squares of such numbers stay far from what Real can hold.
template <class T>
struct HasSmallSquares {
  enum { VALUE = 0 };
};
template <>
struct HasSmallSquares<f16> {
  enum { VALUE = 1 };
};

// One count, and moments for each channel the thread sees.
struct ThreadStatistics {
  // Chunks between joins, but for the first one, which is joined by itself: so many values go into plain sums, and a
  // centre comes of at least a ninth of them and those before (the first one of a fourth of its chunk).
  enum { CHUNKS = 8, VALUES = CHUNKS * UNROLL * VECTOR / LANES };

  // What squares are divided by before they are added up: the sum would overflow before their mean does.
  enum { DIVISOR = HasSmallSquares<Element>::VALUE ? 1 : VALUES };

  const PerLane pivot;
  Real centre[LANES];
  u32 chunks, added;  // in the sums
  Real sums[VECTOR], squares[VECTOR];
  u32 count;  // in the moments
  Moments moments[LANES];

  DEVICE explicit ThreadStatistics(const PerLane& pivot) : pivot(pivot), count(0) {
#pragma unroll
    for (int lane = 0; lane < LANES; lane++) moments[lane].mean = moments[lane].variance = Real(0);
    clear();
  }

  DEVICE void push(const Pack (&x)[UNROLL], const Span (&spans)[UNROLL]) {
    u32 values = 0;
#pragma unroll
    for (int u = 0; u < UNROLL; u++) values += values_of(spans[u]);
    if (count == 0) find_centre(x, spans);
    added += values;
#pragma unroll
    for (int u = 0; u < UNROLL; u++)
#pragma unroll
      for (int e = 0; e < VECTOR; e++) {
        const Real deviation = owns(spans[u], e) ? to_real(x[u].lane[e]) - centre[CHANNEL(e)] : Real(0);
        sums[e] = sums[e] + deviation;
        squares[e] = fma_rn(deviation * (Real(1) / Real(DIVISOR)), deviation, squares[e]);
      }
    chunks++;
    if (count == 0 || chunks >= CHUNKS) join();
  }

  DEVICE void put_down(Welford (&states)[LANES]) {
    join();
#pragma unroll
    for (int lane = 0; lane < LANES; lane++) {
      states[lane].count = count;
      states[lane].moments = moments[lane];
    }
  }

  // The mean of a vector's values: of one that has no fewer than the others, so not less than its share of the chunk.
  DEVICE void find_centre(const Pack (&x)[UNROLL], const Span (&spans)[UNROLL]) {
    Pack vector = x[0];
    Span span = spans[0];
#if EDGES
#pragma unroll
    for (int u = 1; u < UNROLL; u++) {
      if (values_of(spans[u]) <= values_of(span)) continue;
      vector = x[u];
      span = spans[u];
    }
#endif
    Real found[VECTOR];
#pragma unroll
    for (int e = 0; e < VECTOR; e++) found[e] = owns(span, e) ? to_real(vector.lane[e]) - pivot[e] : Real(0);
    fold(found);
    const Real inverse = divide_rn(Real(1), (Real)values_of(span));
#pragma unroll
    for (int lane = 0; lane < LANES; lane++) set_centre(lane, found[lane] * inverse);
  }

  // How many values of each channel the thread owns in a vector.
  DEVICE static u32 values_of(const Span& span) { return owns_any(span) ? (span.last - span.first) / LANES : 0; }

  // At a mean of x - pivot; one that is not finite would make every deviation NaN.
  DEVICE void set_centre(int lane, Real mean) {
    const Real near = pivot[lane] + mean;
    centre[lane] = is_finite(near) ? near : pivot[lane];
  }

  DEVICE void join() {
    if (added == 0) return;
    fold(sums);
    fold(squares);
    const Real inverse = divide_rn(Real(1), (Real)added);
    const u32 total = count + added;
    // Together they are 1, but for one rounding.
    const Real weight_added = divide_rn((Real)added, (Real)total), weight = Real(1) - weight_added;
#pragma unroll
    for (int lane = 0; lane < LANES; lane++) {
      const Real mean = sums[lane] * inverse, mean_square = squares[lane] * (inverse * Real(DIVISOR));
      const Real variance = fma_rn(-mean, mean, mean_square);
      // Rounding may leave less than nothing of a variance of 0; a NaN stays one.
      const Moments found = {(centre[lane] - pivot[lane]) + mean, variance < Real(0) ? Real(0) : variance};
      moments[lane] = count == 0 ? found : merge(moments[lane], found, weight, weight_added);
      set_centre(lane, moments[lane].mean);
    }
    count = total;
    clear();
  }

  DEVICE void clear() {
    chunks = added = 0;
#pragma unroll
    for (int e = 0; e < VECTOR; e++) sums[e] = squares[e] = Real(0);
  }
};
