//! The turns of rotary embeddings, worked out once a step for all layers that turn alike.
//!
//! A turn is a sine and a cosine in double precision, and a model of sixty layers would ask for the same ones a hundred and
//! twenty times.

use paceline_kernels::rope::{RopeTable, Turn};

use crate::RopeSpec;

/// The different rotary embeddings of a plan.
#[derive(Default)]
pub(super) struct Ropes(Vec<Rope>);

struct Rope {
    spec: RopeSpec,
    table: RopeTable,
    /// `[n_rows, n_rot / 2]`.
    turns: Vec<Turn>,
}

impl Ropes {
    /// The number of the embedding `spec`; `factors` are the values behind its `factors`.
    pub fn add(&mut self, spec: &RopeSpec, factors: Option<&[f32]>) -> usize {
        if let Some(at) = self.0.iter().position(|rope| rope.spec == *spec) {
            return at;
        }
        let base = f64::from(spec.base);
        let table = RopeTable::new(spec.n_rot, base, factors).scaled(spec.scaling, base);
        self.0.push(Rope { spec: spec.clone(), table, turns: Vec::new() });
        self.0.len() - 1
    }

    /// Works out the turns of a step's rows.
    pub fn turn_to(&mut self, positions: &[u32]) {
        for Rope { table, turns, .. } in &mut self.0 {
            let n_pairs = table.n_rot() / 2;
            turns.resize(positions.len() * n_pairs, [0.0; 2]);
            for (position, turns) in positions.iter().zip(turns.chunks_exact_mut(n_pairs.max(1))) {
                table.turns(*position, turns);
            }
        }
    }

    /// The turns of embedding `rope` at row `row` of the step.
    pub fn turns(&self, rope: usize, row: usize) -> &[Turn] {
        let Rope { table, turns, .. } = &self.0[rope];
        let n_pairs = table.n_rot() / 2;
        &turns[row * n_pairs..(row + 1) * n_pairs]
    }
}
