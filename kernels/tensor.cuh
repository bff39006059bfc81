// Where element (n, c, h, w) lies in memory, and which thread takes it.
//
// Both layouts are a matrix of `outer` rows, each `stride` elements long, in which `inner` neighbours belong to one
// channel:
//
//          row          stride      inner   channel of position p in a row
//   NCHW   one image    C * H * W   H * W   p / inner
//   NHWC   one pixel    C           1       p
//
// The work is cut into strips (channels that one block takes) and splits (shares of the rows); a block takes one strip
// of one split at a time, a task. Two ways to walk it, chosen by the host:
//
//   planes    NCHW. A strip is one channel: the block runs over that channel's planes (its part of each row), and all
//             lanes of all threads see the same channel. Where a plane begins or ends inside a 16-byte vector (EDGES),
//             the vectors that stick out are read lane by lane.
//   columns   NHWC, and NCHW with planes too short to vectorise by themselves (7x7): a strip is `width` vectors of each
//             row, a whole number of channels. A thread stays in its column, so each of its lanes sees one channel for
//             good.
#pragma once
#include "device.cuh"

typedef ELEMENT Element;  // what tensors hold
typedef REAL Real;        // parameters, statistics and arithmetic
typedef INDEX Index;      // u32 where every offset fits 31 bits, else u64

typedef Vector<Element, VECTOR> Pack;

#if WALK_COLUMNS
enum { LANES = VECTOR };  // channels a thread sees
#else
enum { LANES = 1 };
#endif

// The channel, of those a thread sees, that lane e of a vector belongs to.
#define CHANNEL(e) ((e) % LANES)

struct Tiling {
  u64 outer;           // rows
  u64 stride;          // elements of a row
  u64 inner;           // neighbours in a row that belong to one channel
  u64 slots;           // vectors of a row that a task runs over: of one plane, or of the whole row
  u64 width;           // columns: vectors of a row in a strip; planes: 1
  u64 channels;        // C
  u64 strip_channels;  // channels of a strip
  u64 strips;
  u64 splits;
  u64 share;  // work of one split: vectors of a channel (planes), rows (columns)
  u64 team;   // threads that reduce one channel together: a power of two up to a warp
};

// A vector's place in memory and, counted in vectors, in the task's share; and which of its lanes the thread owns:
// [first, last). Threads take places in the order of their numbers, so on chip neighbours lie side by side.
struct Span {
  Index offset;
  u32 place, first, last;
};

struct Task {
  Index strip, split;
  Index channel;  // first of the strip
  u32 channels;   // of the strip

  DEVICE Task(const Tiling& tiling, Index strip, Index split)
      : strip(strip), split(split), channel(strip * (Index)tiling.strip_channels) {
    const Index left = (Index)tiling.channels - channel;
    channels = (u32)(left < (Index)tiling.strip_channels ? left : (Index)tiling.strip_channels);
  }
  // Neighbouring blocks take neighbouring strips, so that together they stream through memory.
  DEVICE Task(const Tiling& tiling, Index number)
      : Task(tiling, number % (Index)tiling.strips, number / (Index)tiling.strips) {}
};

DEVICE Index number_of_tasks(const Tiling& tiling) { return (Index)tiling.strips * (Index)tiling.splits; }

// The work of a task, in the units of tiling.share: [begin, end) of the strip's vectors (planes) or rows (columns).
struct Share {
  Index begin, end;

  // The last splits may have nothing to do.
  DEVICE Share(const Tiling& tiling, const Task& task) {
#if WALK_COLUMNS
    const Index total = (Index)tiling.outer;
#else
    const Index total = (Index)tiling.outer * (Index)tiling.slots;
#endif
    const Index share = (Index)tiling.share;
    begin = task.split * share < total ? task.split * share : total;
    end = begin + share < total ? begin + share : total;
  }
};

#if WALK_COLUMNS

// A thread's way through a task: down one column of vectors.
struct Walk {
  Index row, end, offset, step;
  u32 rows_at_once, column, place, place_step;

  DEVICE Walk(const Tiling& tiling, const Task& task, const Element*) {
    const u32 width = (u32)tiling.width;
    rows_at_once = THREADS / width;
    column = threadIdx.x % width;
    const u32 lane_row = threadIdx.x / width;
    const Share share(tiling, task);
    end = share.end;
    const Index slot = task.strip * width + column;
    // Threads that are left over when rows are dealt out, and columns beyond the row's end, have nothing to do.
    row = lane_row < rows_at_once && slot < (Index)tiling.slots ? share.begin + lane_row : end;
    offset = row * (Index)tiling.stride + slot * VECTOR;
    step = rows_at_once * (Index)tiling.stride;
    place = threadIdx.x;
    place_step = rows_at_once * width;
  }

  DEVICE bool done() const { return row >= end; }
  DEVICE bool full() const { return row + (UNROLL - 1) * rows_at_once < end; }

  DEVICE Span next(bool in_full_chunk = false) {
    const Span span = {offset, place, 0, in_full_chunk || row < end ? (u32)VECTOR : 0u};
    row += rows_at_once;
    offset += step;
    place += place_step;
    return span;
  }

  // Which of the strip's channels lane `lane` sees.
  DEVICE u32 channel(const Tiling& tiling, u32 lane) const { return (column * VECTOR + lane) / (u32)tiling.inner; }
};

#else

// A thread's way through a task: every THREADS-th vector of the channel's planes.
struct Walk {
  Index place, places;           // of the share
  Index slot, slots, slot_step;  // in the plane
  Index origin, origin_step, stride;
  Index inner;
  u32 base;

  DEVICE Walk(const Tiling& tiling, const Task& task, const Element* tensor) {
    slots = (Index)tiling.slots;
    stride = (Index)tiling.stride;
    inner = (Index)tiling.inner;
    const Share share(tiling, task);
    place = threadIdx.x;
    places = share.end - share.begin;
    const Index vector = share.begin + place;  // of the channel
    slot = vector % slots;
    origin = vector / slots * stride + task.channel * inner;
    slot_step = THREADS % slots;
    origin_step = THREADS / slots * stride;
    base = (u32)((u64)tensor / sizeof(Element));
  }

  DEVICE bool done() const { return place >= places; }
#if EDGES
  DEVICE bool full() const { return false; }
#else
  DEVICE bool full() const { return place + (UNROLL - 1) * THREADS < places; }
#endif

  DEVICE Span next(bool in_full_chunk = false) {
    Span span;
#if EDGES
    // Vectors lie where memory is aligned: the plane's first one may begin before the plane.
    const u32 phase = (base + (u32)origin) % VECTOR;
    const Index begin = slot * VECTOR;  // counted from the vector in which the plane begins
    span.offset = origin + begin - phase;
    const Index plane_end = inner + phase;
    span.first = begin < phase ? (u32)(phase - begin) : 0u;
    span.last = begin + VECTOR <= plane_end ? (u32)VECTOR : begin < plane_end ? (u32)(plane_end - begin) : 0u;
    if (done()) span.last = 0;
#else
    span.offset = origin + slot * VECTOR;
    span.first = 0;
    span.last = in_full_chunk || !done() ? (u32)VECTOR : 0u;
#endif
    span.place = (u32)place;
    place += THREADS;
    slot += slot_step;
    origin += origin_step;
    if (slot >= slots) {
      slot -= slots;
      origin += stride;
    }
    return span;
  }

  DEVICE u32 channel(const Tiling&, u32) const { return 0; }
};

#endif

// Calls `take(full)` for one chunk of UNROLL vectors after another until the walk is done. In a full chunk every vector
// is the thread's, whole: since `full` is a constant where take is inlined, such a chunk asks nothing. They are most of
// the chunks, but along planes with edges, where there are none. It costs registers, so it is for kernels that do more
// with a value than memory takes to bring it.
template <class Take>
DEVICE void for_each_chunk(const Walk& walk, Take take) {
  while (walk.full()) take(true);
#if EDGES
  while (!walk.done()) take(false);
#else
  if (!walk.done()) take(false);
#endif
}

// Whether the thread owns lane e of the vector. Without edges a vector is owned whole or not at all.
DEVICE bool owns(const Span& span, u32 e) {
#if EDGES
  return e >= span.first && e < span.last;
#else
  return span.last != 0;
#endif
}

DEVICE bool owns_all(const Span& span) { return span.first == 0 && span.last == VECTOR; }
DEVICE bool owns_any(const Span& span) { return span.first < span.last; }

// One number of a per-channel vector.
template <class T>
DEVICE T load_one(const T* from) {
  return load<1>(from).lane[0];
}
template <class T>
DEVICE void store_one(T* to, T value) {
  Vector<T, 1> one;
  one.lane[0] = value;
  store<1>(to, one);
}

// How a tensor is read: because a later kernel will read it again, or for the last time.
struct Cached {
  template <int N>
  DEVICE static Vector<Element, N> load(const Element* from) {
    return ::load<N>(from);
  }
};
struct LastUse {
  template <int N>
  DEVICE static Vector<Element, N> load(const Element* from) {
    return load_last_use<N>(from);
  }
};

// Reads what the thread owns of a vector; the other lanes are zero.
template <class Hint>
DEVICE Pack load_span(const Element* tensor, const Span& span) {
  if (owns_all(span)) return Hint::template load<VECTOR>(tensor + span.offset);
  Pack pack;
#pragma unroll
  for (int e = 0; e < VECTOR; e++) {
    pack.lane[e] = Element();
#if EDGES
    if (owns(span, e)) pack.lane[e] = Hint::template load<1>(tensor + (Index)(span.offset + e)).lane[0];
#endif
  }
  return pack;
}

DEVICE void store_span(Element* tensor, const Span& span, const Pack& pack) {
  if (owns_all(span)) {
    store_streaming<VECTOR>(tensor + span.offset, pack);
    return;
  }
#if EDGES
#pragma unroll
  for (int e = 0; e < VECTOR; e++) {
    Vector<Element, 1> one;
    one.lane[0] = pack.lane[e];
    if (owns(span, e)) store_streaming<1>(tensor + (Index)(span.offset + e), one);
  }
#endif
}

// Adds up those of a vector's values that belong to one channel, pairwise; what is left is one per channel seen.
DEVICE void fold(Real (&sums)[VECTOR]) {
#pragma unroll
  for (int half = VECTOR / 2; half >= LANES; half /= 2)
#pragma unroll
    for (int e = 0; e < half; e++) sums[e] = sums[e] + sums[e + half];
}
