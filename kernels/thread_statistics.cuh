// What one thread learns of mean and variance on its way through a task.
//
// It takes its vectors UNROLL at a time, so that as many loads are under way. It finds mean and variance of such a
// chunk in registers, in two passes, and joins the chunk to what it has by Welford's rule: exact about the chunk, and
// one division joins all of its channels.
#pragma once
#include "normalise.cuh"
#include "welford.cuh"

// One count, and moments for each channel the thread sees.
struct ThreadStatistics {
  u32 count;
  Moments moments[LANES];

  DEVICE ThreadStatistics() : count(0) {
#pragma unroll
    for (int lane = 0; lane < LANES; lane++) moments[lane].mean = moments[lane].variance = Real(0);
  }

  DEVICE void push(const Pack (&x)[UNROLL], const Span (&spans)[UNROLL], const PerLane& pivot) {
    Real difference[UNROLL][VECTOR], sums[VECTOR];
    u32 added = 0;
#pragma unroll
    for (int e = 0; e < VECTOR; e++) sums[e] = Real(0);
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      added += spans[u].last > spans[u].first ? spans[u].last - spans[u].first : 0;
#pragma unroll
      for (int e = 0; e < VECTOR; e++) {
        difference[u][e] = owns(spans[u], e) ? to_real(x[u].lane[e]) - pivot[e] : Real(0);
        sums[e] = sums[e] + difference[u][e];
      }
    }
    added /= LANES;
    if (added == 0) return;
    fold(sums);
    const Real inverse = divide_rn(Real(1), (Real)added);
    Moments chunk[LANES];
#pragma unroll
    for (int lane = 0; lane < LANES; lane++) chunk[lane].mean = sums[lane] * inverse;

#pragma unroll
    for (int e = 0; e < VECTOR; e++) sums[e] = Real(0);
#pragma unroll
    for (int u = 0; u < UNROLL; u++)
#pragma unroll
      for (int e = 0; e < VECTOR; e++) {
        const Real deviation = owns(spans[u], e) ? difference[u][e] - chunk[CHANNEL(e)].mean : Real(0);
        // Divided before they are added up: the sum would overflow before the variance does.
        sums[e] = fma_rn(deviation * inverse, deviation, sums[e]);
      }
    fold(sums);
    const u32 total = count + added;
    // Together they are 1, but for one rounding.
    const Real weight_added = divide_rn((Real)added, (Real)total), weight = Real(1) - weight_added;
#pragma unroll
    for (int lane = 0; lane < LANES; lane++) {
      chunk[lane].variance = sums[lane];
      moments[lane] = count == 0 ? chunk[lane] : merge(moments[lane], chunk[lane], weight, weight_added);
    }
    count = total;
  }

  DEVICE void put_down(Welford (&states)[LANES]) const {
#pragma unroll
    for (int lane = 0; lane < LANES; lane++) {
      states[lane].count = count;
      states[lane].moments = moments[lane];
    }
  }
};
