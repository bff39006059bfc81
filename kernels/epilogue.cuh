// What is fused behind the normalisation, forward and backward.
//
//   EPILOGUE 0   y = v
//   EPILOGUE 1   y = relu(v)
//   EPILOGUE 2   y = relu(v + z)
//
// relu keeps NaN, and lets the gradient pass wherever its result is not 0 or less: so through a NaN, as in PyTorch.
#pragma once
#include "tensor.cuh"

enum { HAS_RELU = EPILOGUE != 0, HAS_RESIDUAL = EPILOGUE == 2 };

DEVICE Real relu(Real v) { return v <= Real(0) ? Real(0) : v; }

DEVICE Element forward_epilogue(Real v, Element residual) {
  if (HAS_RESIDUAL) v = v + to_real(residual);
  if (HAS_RELU) v = relu(v);
  Element y;
  from_real(v, y);
  return y;
}

// The gradient at v, of the gradient at y, which was stored as an Element.
DEVICE Real backward_epilogue(Real dy, Element y) { return HAS_RELU && to_real(y) <= Real(0) ? Real(0) : dy; }
