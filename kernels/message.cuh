// What the ranks of a synchronised batch norm tell each other in one pass, as src/sync/message.rs lays it out.
//
// A message is two words of 64 bits, then three vectors of one number per channel:
//
//   tag     says which pass this is, of how many channels
//   count   values per channel in this rank's batch; 0 of an empty one, whose vectors say nothing
//
// An Element is a parameter here (float or double), and a Real is a double: between ranks there are a few numbers per
// channel, so double precision costs nothing, and any number of ranks adds no error to single precision.
#pragma once
#include "tensor.cuh"

// One rank's message.
struct Message {
  const u8* bytes;
  u64 channels;

  DEVICE u64 tag() const { return load_one((const u64*)bytes); }
  DEVICE u64 count() const { return load_one((const u64*)bytes + 1); }
  DEVICE Real at(int vector, u64 channel) const {
    return load_one((const Element*)((const u64*)bytes + 2) + (vector * channels + channel));
  }
};

// All ranks' messages, in the order of the ranks.
struct Gathered {
  const u8* messages;
  u64 ranks;
  u64 bytes;  // of one message
  u64 tag;    // that each must have
  u64 channels;

  DEVICE Message of(u64 rank) const {
    const Message message = {messages + rank * bytes, channels};
    return message;
  }
};

// What the ranks' meeting came to, for the host to ask after: a state, and the values per channel of all ranks.
enum Outcome { SOUND, ONE_VALUE, RANKS_DISAGREE };

// Not a number that could be mistaken for a result: what comes of messages that do not belong together.
DEVICE Real nothing() { return divide_rn(Real(0), Real(0)); }
