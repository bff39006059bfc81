//! The images: 1,797 handwritten digits of 8 x 8 pixels, with the digit that each shows.
//!
//! E. Alpaydin and C. Kaynak, [Optical Recognition of Handwritten Digits](https://doi.org/10.24432/C50P49), UCI Machine
//! Learning Repository, 1998; licence CC BY 4.0. `scripts/export-digits` writes the file.

use candle_core::{DType, Device, Result, Tensor};
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;

static FILE: &[u8] = include_bytes!("digits.safetensors");

/// Images [N, 1, 8, 8] of ink from 0 to 1, and the digits that they show, [N].
pub struct Set {
    pub images: Tensor,
    pub labels: Tensor,
}

impl Set {
    pub fn len(&self) -> usize {
        self.labels.elem_count()
    }

    /// Those with these numbers.
    pub fn select(&self, numbers: &[u32]) -> Result<Self> {
        let numbers = Tensor::new(numbers, self.labels.device())?;
        Ok(Self {
            images: self.images.index_select(&numbers, 0)?,
            labels: self.labels.index_select(&numbers, 0)?,
        })
    }

    /// How many of the predicted digits are right, of all.
    pub fn accuracy(&self, logits: &Tensor) -> Result<f64> {
        let right = logits.argmax(1)?.eq(&self.labels)?.to_dtype(DType::F32)?.sum_all()?;
        Ok(f64::from(right.to_scalar::<f32>()?) / self.len() as f64)
    }
}

/// The images in two sets, four fifths to train with and one to test with, dealt by the seed.
pub fn load(seed: u64, device: &Device) -> Result<[Set; 2]> {
    let mut tensors = candle_core::safetensors::load_buffer(FILE, device)?;
    let mut take = |name: &str| {
        tensors
            .remove(name)
            .ok_or_else(|| candle_core::Error::msg(format!("no {name}")))
    };
    let all = Set {
        images: (take("images")?.to_dtype(DType::F32)? / 16.0)?.unsqueeze(1)?,
        labels: take("labels")?.to_dtype(DType::U32)?,
    };
    let mut numbers: Vec<u32> = (0..all.len() as u32).collect();
    numbers.shuffle(&mut StdRng::seed_from_u64(seed));
    let (test, train) = numbers.split_at(all.len() / 5);
    Ok([all.select(train)?, all.select(test)?])
}
