//! Which tensors of x's size a step in candle allocates: y and the gradients, and no others. Counted in the allocator.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::Write as _;
use std::sync::atomic::{AtomicUsize, Ordering};

use batchnorm_cuda::candle::{BatchNorm2d, batch_norm};
use candle_core::{DType, Device, ModuleT, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};

const SHAPE: [usize; 4] = [8, 16, 32, 32];
const ELEMENTS: usize = 8 * 16 * 32 * 32;

/// The system's allocator, which counts what is as large as a tensor of two-byte elements. All else here is far smaller.
struct Counting;

static LARGE: AtomicUsize = AtomicUsize::new(0);

fn count(layout: &Layout) {
    if layout.size() >= 2 * ELEMENTS {
        LARGE.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(&layout);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(&layout);
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, address: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(address, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Runs `f`, and counts the large allocations meanwhile.
fn counted<R>(f: impl FnOnce() -> Result<R>) -> Result<(R, usize)> {
    let before = LARGE.load(Ordering::Relaxed);
    let result = f()?;
    Ok((result, LARGE.load(Ordering::Relaxed) - before))
}

fn module() -> Result<BatchNorm2d> {
    batch_norm(
        16,
        1e-5,
        VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu),
    )
}

/// One test, because all of a process share the count.
#[test]
fn a_step_allocates_y_and_the_gradients() -> Result<()> {
    for dtype in [DType::F16, DType::F32] {
        let random = || Tensor::randn(0f32, 1.0, &SHAPE, &Device::Cpu)?.to_dtype(dtype);
        let (x, residual) = (Var::from_tensor(&random()?)?, Var::from_tensor(&random()?)?);
        let nhwc = Var::from_tensor(&random()?.permute((0, 2, 3, 1))?.contiguous()?)?;
        let last = nhwc.permute((0, 3, 1, 2))?;
        let framed = Tensor::cat(&[&random()?, &random()?], 0)?;
        let offset = framed.narrow(0, 4, 8)?;
        let upright = Var::from_tensor(&random()?)?;
        let turned = upright.transpose(2, 3)?;

        type Pass<'a> = (&'a str, usize, Box<dyn Fn(&BatchNorm2d, bool) -> Result<Tensor> + 'a>);
        let passes: [Pass; 8] = [
            ("plain", 1, Box::new(|bn, train| bn.forward_t(&x, train))),
            ("relu", 1, Box::new(|bn, train| bn.forward_relu_t(&x, train))),
            (
                "add + relu",
                1,
                Box::new(|bn, train| bn.forward_add_relu_t(&x, &residual, train)),
            ),
            ("channels last", 1, Box::new(|bn, train| bn.forward_t(&last, train))),
            ("at an offset", 1, Box::new(|bn, train| bn.forward_t(&offset, train))),
            (
                "both channels last",
                1,
                Box::new(|bn, train| bn.forward_add_relu_t(&last, &last, train)),
            ),
            // What must be copied: a tensor of another order, and a residual of another order than x.
            (
                "columns before rows",
                2,
                Box::new(|bn, train| bn.forward_t(&turned, train)),
            ),
            (
                "residual alone channels last",
                2,
                Box::new(|bn, train| bn.forward_add_relu_t(&x, &last, train)),
            ),
        ];
        for (what, expected, pass) in &passes {
            for train in [true, false] {
                let bn = module()?;
                let (_, allocated) = counted(|| pass(&bn, train))?;
                assert_eq!(allocated, *expected, "{what}, {dtype:?}, train {train}");
            }
        }

        // candle's autograd allocates by itself. What it does so for an operation that allocates one gradient is known.
        let backward = |y: Tensor| counted(|| y.sum_all()?.backward()).map(|(_, allocated)| allocated);
        let one = backward(x.affine(2.0, 0.0)?)?;
        // For one more gradient: that gradient, zeros to add it to, and the sum.
        let two = one + 3;
        for train in [true, false] {
            let bn = module()?;
            assert_eq!(backward(bn.forward_t(&x, train)?)?, one);
            assert_eq!(backward(bn.forward_relu_t(&x, train)?)?, one);
            assert_eq!(backward(bn.forward_add_relu_t(&x, &residual, train)?)?, two);
            // x is no variable: the parameters' gradients need no tensor but candle's own for dy.
            assert_eq!(backward(bn.forward_t(&offset, train)?)?, one - 3);

            // In another memory order, beside what candle allocates for the view that x is. y is a view too where channels
            // are last: zeros, and the sum.
            let viewed = |x: &Tensor| backward(x.affine(2.0, 0.0)?);
            let (last_alone, turned_alone) = (viewed(&last)?, viewed(&turned)?);
            assert_eq!((last_alone, turned_alone), (one + 2, one + 2));
            assert_eq!(backward(bn.forward_t(&last, train)?)?, last_alone + 2);
            assert_eq!(
                backward(bn.forward_add_relu_t(&last, &last, train)?)?,
                last_alone + 2 + 2
            );
            // What was copied forward costs the backward pass nothing.
            assert_eq!(backward(bn.forward_t(&turned, train)?)?, turned_alone);
            assert_eq!(backward(bn.forward_add_relu_t(&x, &last, train)?)?, last_alone + 3);
            assert_eq!(backward(bn.forward_add_relu_t(&last, &x, train)?)?, last_alone + 2 + 3);
        }
    }

    // For comparison, not a promise: the same step by candle-nn's operations.
    let x = Var::from_tensor(&Tensor::randn(0f32, 1.0, &SHAPE, &Device::Cpu)?)?;
    let candle = candle_nn::batch_norm(
        16,
        1e-5,
        VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu),
    )?;
    let bn = module()?;
    let step = |module: &dyn ModuleT| -> Result<[usize; 2]> {
        let (y, forward) = counted(|| module.forward_t(&x, true))?;
        let (_, backward) = counted(|| y.sum_all()?.backward())?;
        Ok([forward, backward])
    };
    let (own, theirs) = (step(&bn)?, step(&candle)?);
    // The harness keeps what the print macros write.
    writeln!(
        std::io::stderr(),
        "tensors allocated, forward and backward with candle's autograd: {own:?}, with candle-nn's module {theirs:?}"
    )?;
    assert!(own[0] < theirs[0] && own[1] < theirs[1]);
    Ok(())
}
