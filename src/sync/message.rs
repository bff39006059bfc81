//! What the ranks of a synchronised batch norm tell each other in one pass: the layout of the words, which
//! `kernels/message.cuh` shares, and how they are written and read on the host.

use crate::backend::Backend;
use crate::element::{Dtype, Real};
use crate::error::{Error, Result};

/// Which pass a message belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Count, pivot, mean of the differences from it, variance.
    Statistics,
    /// Count, Σ g, Σ g · (x - mean).
    Sums,
}

/// A message's layout: a tag, a count of values per channel, then [`Layout::VECTORS`] vectors of one number per channel,
/// each in the parameter type. All ranks' messages of a module have the same length, whatever their batches and whichever
/// pass they belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    channels: usize,
    param: Dtype,
    ranks: usize,
    module: u16,
}

impl Layout {
    /// Vectors of one number per channel. The backward pass leaves the last as it is.
    const VECTORS: usize = 3;
    /// Tag and count.
    const HEADER: usize = 2;
    /// Messages are whole multiples of this many words, so that every rank's lies as a collective likes it best.
    const GRAIN: usize = 2;

    /// `module` is a number that the ranks have agreed on, so that messages of modules of one size are told apart.
    pub(crate) fn new<P: Real>(channels: usize, ranks: usize, module: u16) -> Self {
        Self {
            channels,
            param: P::DTYPE,
            ranks,
            module,
        }
    }

    /// C.
    pub(crate) fn channels(&self) -> usize {
        self.channels
    }

    /// How many messages there are.
    pub(crate) fn ranks(&self) -> usize {
        self.ranks
    }

    /// Words of one message.
    pub(crate) fn words(&self) -> usize {
        let numbers = Self::VECTORS * self.channels;
        (Self::HEADER + (numbers * self.param.size()).div_ceil(size_of::<i64>())).next_multiple_of(Self::GRAIN)
    }

    /// Where a vector begins, in bytes.
    pub(crate) fn offset(&self, vector: usize) -> usize {
        Self::HEADER * size_of::<i64>() + vector * self.channels * self.param.size()
    }

    /// What the first word of a message says. Of the channels it has what fits; the length of the message has the rest.
    pub(crate) fn tag(&self, kind: Kind) -> i64 {
        let kind = match kind {
            Kind::Statistics => 1,
            Kind::Sums => 2,
        };
        let size = self.param.size() as i64;
        kind << 56 | size << 48 | i64::from(self.module) << 32 | i64::from(self.channels as u32)
    }

    /// A message of this many values per channel whose vectors are zero.
    pub(crate) fn blank(&self, kind: Kind, values: usize) -> Vec<i64> {
        let mut words = vec![0; self.words()];
        (words[0], words[1]) = (self.tag(kind), values as i64);
        words
    }

    /// Writes a number of a message.
    pub(crate) fn put<P: Real>(&self, words: &mut [i64], vector: usize, channel: usize, value: P) {
        let at = vector * self.channels + channel;
        let value = value.to_f64();
        match P::DTYPE {
            Dtype::F64 => words[Self::HEADER + at] = value.to_bits() as i64,
            // Two to a word, the first in its lower half: as they lie in the memory of a device.
            _ => {
                let (word, shift) = (&mut words[Self::HEADER + at / 2], 32 * (at % 2));
                let bits = i64::from((value as f32).to_bits());
                *word = *word & !(0xffff_ffff << shift) | bits << shift;
            }
        }
    }

    /// Reads a number of a message. In double precision, as everything between ranks is.
    pub(crate) fn get(&self, words: &[i64], vector: usize, channel: usize) -> f64 {
        let at = vector * self.channels + channel;
        match self.param {
            Dtype::F64 => f64::from_bits(words[Self::HEADER + at] as u64),
            _ => f32::from_bits((words[Self::HEADER + at / 2] >> (32 * (at % 2))) as u32).into(),
        }
    }

    /// All ranks' messages, each with its count of values; refused if one of them belongs to another pass.
    pub(crate) fn messages<'a>(&self, kind: Kind, gathered: &'a [i64]) -> Result<Vec<(u64, &'a [i64])>> {
        gathered
            .chunks_exact(self.words())
            .enumerate()
            .map(|(rank, message)| {
                if message[0] == self.tag(kind) {
                    Ok((message[1] as u64, message))
                } else {
                    Err(Error::RanksDisagree {
                        what: "pass",
                        rank,
                        expected: format!(
                            "{kind:?} of {} channels of module {} (tag {:x})",
                            self.channels,
                            self.module,
                            self.tag(kind)
                        ),
                        got: format!("tag {:x}", message[0]),
                    })
                }
            })
            .collect()
    }
}

/// What a meeting came to, in the first word of [`Exchange::outcome`]: `enum Outcome` of `kernels/message.cuh`.
pub(crate) const SOUND: i64 = 0;
/// All ranks together have one value per channel.
pub(crate) const ONE_VALUE: i64 = 1;
/// A message was of another pass, or of another module.
pub(crate) const RANKS_DISAGREE: i64 = 2;

/// The messages of one step, and what became of them.
#[doc(hidden)]
#[derive(Debug)]
pub struct Exchange<B: Backend> {
    /// How a message is laid out.
    pub layout: Layout,
    /// This rank's statistics: one message.
    pub statistics: B::Buffer<i64>,
    /// This rank's sums over the gradient: one message.
    pub sums: B::Buffer<i64>,
    /// All ranks' messages of the pass under way, in the order of the ranks.
    pub gathered: B::Buffer<i64>,
    /// Two words: what the last meeting came to ([`SOUND`] if nothing was wrong), and the values per channel of all ranks
    /// together.
    pub outcome: B::Buffer<i64>,
}

impl<B: Backend> Exchange<B> {
    pub(crate) fn new(backend: &B, layout: Layout, values: usize) -> Result<Self> {
        let words = layout
            .words()
            .checked_mul(layout.ranks)
            .ok_or(Error::out_of_memory::<i64>(usize::MAX))?;
        Ok(Self {
            layout,
            statistics: backend.upload(&layout.blank(Kind::Statistics, values))?,
            sums: backend.upload(&layout.blank(Kind::Sums, values))?,
            gathered: backend.zeros(words)?,
            outcome: backend.zeros(2)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip<P: Real>(channels: usize) {
        let layout = Layout::new::<P>(channels, 1, 0);
        let mut words = layout.blank(Kind::Sums, 7);
        let value = |vector: usize, channel: usize| P::from_f64(-1.5 * vector as f64 + 0.1 * channel as f64);
        for vector in 0..Layout::VECTORS {
            for channel in (0..channels).rev() {
                layout.put(&mut words, vector, channel, P::from_f64(f64::NAN));
                layout.put(&mut words, vector, channel, value(vector, channel));
            }
        }
        let messages = layout.messages(Kind::Sums, &words).unwrap();
        assert_eq!(messages.len(), 1);
        assert_eq!(messages[0].0, 7);
        for vector in 0..Layout::VECTORS {
            for channel in 0..channels {
                let expected = value(vector, channel).to_f64();
                assert_eq!(layout.get(messages[0].1, vector, channel), expected);
            }
        }
        // As a device finds them: numbers one after another behind the header.
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let at = layout.offset(1);
        let second = match P::DTYPE {
            Dtype::F64 => f64::from_le_bytes(*bytes[at..].first_chunk().unwrap()),
            _ => f32::from_le_bytes(*bytes[at..].first_chunk().unwrap()).into(),
        };
        assert_eq!(second, value(1, 0).to_f64());
    }

    #[test]
    fn what_is_put_is_got() {
        for channels in [1, 2, 3, 7] {
            round_trip::<f32>(channels);
            round_trip::<f64>(channels);
        }
    }

    #[test]
    fn a_message_of_another_pass_is_refused() {
        let layout = Layout::new::<f32>(3, 2, 5);
        let mut gathered = layout.blank(Kind::Statistics, 4);
        gathered.extend(layout.blank(Kind::Sums, 4));
        let error = layout.messages(Kind::Statistics, &gathered).unwrap_err();
        assert!(
            matches!(
                error,
                Error::RanksDisagree {
                    what: "pass",
                    rank: 1,
                    ..
                }
            ),
            "{error}"
        );
        let others = [
            Layout::new::<f32>(4, 2, 5),
            Layout::new::<f64>(3, 2, 5),
            Layout::new::<f32>(3, 2, 6),
            Layout::new::<f32>(3, 2, u16::MAX),
        ];
        for other in others {
            assert_ne!(layout.tag(Kind::Sums), other.tag(Kind::Sums));
        }
    }

    #[test]
    fn messages_have_one_length_and_keep_their_alignment() {
        for channels in 1..9 {
            for layout in [Layout::new::<f32>(channels, 3, 1), Layout::new::<f64>(channels, 3, 1)] {
                assert_eq!(layout.words() % 2, 0);
                assert!(layout.words() * 8 >= layout.offset(3));
                assert_eq!(layout.blank(Kind::Sums, 0).len(), layout.words());
            }
        }
    }
}
