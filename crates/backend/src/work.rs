//! How much a plan reads and computes: what measured times are held against.

/// Products that are added up, by what they are computed with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Macs {
    /// With 8-bit integers.
    pub int: u64,
    /// With floats.
    pub float: u64,
}

impl Macs {
    /// All of them.
    pub fn total(self) -> u64 {
        self.int + self.float
    }
}

/// What the matrix products of one run of a plan come to. Attention and recurrences are not in it: they depend on what
/// sequences remember.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PlanWork {
    /// Bytes of the matrices, in the form that products read; once for all rows, where a backend reads them once.
    pub weight_bytes: u64,
    /// Bytes of the matrices of one expert, on average over the layers: read by each that
    /// [`StepOut::n_experts_read`](crate::StepOut::n_experts_read) counts, on top.
    pub expert_bytes: u64,
    /// Products for each row of the step.
    pub row: Macs,
    /// Products for each output row, on top.
    pub output: Macs,
}

impl PlanWork {
    /// Bytes of the matrices that a step reads in which so many experts are read.
    pub fn read_bytes(&self, n_experts_read: usize) -> u64 {
        self.weight_bytes + self.expert_bytes * n_experts_read as u64
    }

    /// Products of a step of `n` rows with `n_output` outputs.
    pub fn macs(&self, n: usize, n_output: usize) -> Macs {
        let (n, n_output) = (n as u64, n_output as u64);
        Macs {
            int: n * self.row.int + n_output * self.output.int,
            float: n * self.row.float + n_output * self.output.float,
        }
    }
}
