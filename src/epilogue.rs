//! What is fused behind the normalisation.

/// What a pass does to the normalised value before it is stored, without another trip to memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Epilogue {
    /// `y = bn(x)`
    #[default]
    Identity,
    /// `y = relu(bn(x))`
    Relu,
    /// `y = relu(bn(x) + z)`: the end of a residual block.
    AddRelu,
}

impl Epilogue {
    /// All epilogues.
    pub const ALL: [Epilogue; 3] = [Epilogue::Identity, Epilogue::Relu, Epilogue::AddRelu];

    /// `none`, `relu` or `add_relu`.
    pub const fn name(self) -> &'static str {
        match self {
            Epilogue::Identity => "none",
            Epilogue::Relu => "relu",
            Epilogue::AddRelu => "add_relu",
        }
    }
}

impl std::fmt::Display for Epilogue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Epilogue {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Epilogue::ALL
            .into_iter()
            .find(|epilogue| epilogue.name() == text)
            .ok_or_else(|| format!("unknown epilogue {text:?}: expected none, relu or add_relu"))
    }
}
