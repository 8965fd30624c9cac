//! The same plans, steps and states on several backends at once, compared after every step.

use std::sync::Arc;

use paceline_gguf::{GgmlType, Gguf, Metadata, to_bytes};
use paceline_kernels::formats::quantize_rows;

use crate::{
    Backend, Buf, Error, Exec, Experts, Lane, Matrix, PageClasses, PageId, PageTable, PlanBuilder, SavedId,
    SlotId, StateConfig, StateDecl, States, Step, StepOut, Tap, Vector, WeightId, WeightSource, first_cell,
};

use super::random::Random;

/// Sequences that a rig can have.
const N_SLOT: u32 = 16;
/// Pages that it can have, one after the other.
const N_PAGE: u32 = 2048;

/// A weight of a case: `[n_out, n_in]` values in a format.
pub(super) struct Tensor {
    pub n_in: usize,
    pub n_out: usize,
    pub ty: GgmlType,
    pub values: Vec<f32>,
}

impl Tensor {
    /// Random values of `[-size, size)`.
    pub fn random(random: &mut Random, [n_in, n_out]: [usize; 2], ty: GgmlType, size: f32) -> Tensor {
        Tensor { n_in, n_out, ty, values: random.values(n_in * n_out, size) }
    }

    /// A vector of floats.
    pub fn vector(values: Vec<f32>) -> Tensor {
        Tensor { n_in: values.len(), n_out: 1, ty: GgmlType::F32, values }
    }
}

/// The weights of a case on one backend, by index.
pub(super) struct Weights(Vec<Matrix>);

impl Weights {
    fn upload(backend: &dyn Backend, file: &Arc<Gguf>) -> Result<Weights, Error> {
        let upload = |i: usize| {
            let tensor = &file.tensors()[i];
            let id: WeightId = backend.upload(&WeightSource { file: file.clone(), tensor: i })?;
            Ok(Matrix { id, n_in: tensor.n_cols() as usize, n_out: tensor.n_rows() as usize })
        };
        (0..file.tensors().len()).map(upload).collect::<Result<_, _>>().map(Weights)
    }

    pub fn matrix(&self, i: usize) -> Matrix {
        self.0[i]
    }

    /// The tensor as the matrices of some experts, one behind the other.
    pub fn experts(&self, i: usize, n_expert: usize) -> Experts {
        let Matrix { id, n_in, n_out } = self.0[i];
        Experts { id, n_in, n_out: n_out / n_expert, n_expert }
    }

    pub fn vector(&self, i: usize) -> Vector {
        Vector { id: self.0[i].id, len: self.0[i].n_in * self.0[i].n_out }
    }
}

/// Records a plan and returns its output.
pub(super) type Record<'a> = &'a dyn Fn(&mut PlanBuilder<'_>, &Weights) -> Buf;

/// What a rig is made from.
pub(super) struct Setup<'a> {
    pub name: String,
    pub tensors: Vec<Tensor>,
    pub states: Vec<StateDecl>,
    pub config: StateConfig,
    /// The plans, which share weights and states.
    pub plans: Vec<Record<'a>>,
    pub taps: &'a [usize],
}

/// How machines must agree.
#[derive(Clone, Copy)]
pub(super) enum Agree {
    /// With the first one, relative to the largest value of a row, or to this size if all are smaller.
    Within { tolerance: f64, size: f64 },
    /// Bit for bit.
    Bits,
}

struct Machine {
    name: String,
    execs: Vec<Box<dyn Exec>>,
    states: Arc<dyn States>,
    out: StepOut,
}

/// Several backends that do the same.
pub(super) struct Rig {
    name: String,
    machines: Vec<Machine>,
    agree: Agree,
    config: StateConfig,
    classes: PageClasses,
    n_step: usize,
    n_page: u32,
    n_slot: u32,
}

/// A sequence, with what `memory` would know of it.
#[derive(Clone, Debug)]
pub(super) struct Sequence {
    pub n_past: usize,
    /// One for each class.
    pub tables: Vec<PageTable>,
    pub slot: SlotId,
}

/// One row of a step.
#[derive(Clone, Debug, Default)]
pub(super) struct Row {
    pub token: u32,
    pub position: u32,
    pub input: Vec<f32>,
}

/// A lane of a step.
pub(super) struct Part<'a> {
    pub seq: &'a Sequence,
    pub rows: Vec<Row>,
    pub n_certain: usize,
}

impl Agree {
    /// Within `tolerance` of values of which one is 0.1 at least.
    pub fn within(tolerance: f64) -> Agree {
        Agree::Within { tolerance, size: 0.1 }
    }
}

impl Rig {
    pub fn new(backends: &[&dyn Backend], agree: Agree, setup: Setup<'_>) -> Result<Rig, Error> {
        let tensors = setup.tensors.iter().enumerate().map(|(i, t)| {
            let data = quantize_rows(t.ty, t.n_in, &t.values);
            (format!("w{i}"), [t.n_in as u64, t.n_out as u64], t.ty, data)
        });
        let tensors: Vec<_> = tensors.collect();
        let bytes = to_bytes(&Metadata::new(), &tensors).expect("tensors with whole rows");
        let file = Arc::new(Gguf::from_bytes(&setup.name, bytes).expect("a file just written"));
        let machine = |backend: &&dyn Backend| {
            let weights = Weights::upload(*backend, &file)?;
            let states = backend.alloc_states(&setup.states, setup.config)?;
            let compile = |record: &Record<'_>| {
                let taps: Vec<Tap> = setup.taps.iter().map(|&il| Tap::Layer(il)).collect();
                let mut p = PlanBuilder::new(&taps);
                let output = record(&mut p, &weights);
                backend.compile(Arc::new(p.finish(Some(output))), &states)
            };
            let execs = setup.plans.iter().map(compile).collect::<Result<_, _>>()?;
            Ok(Machine { name: backend.describe(), execs, states: states.clone(), out: StepOut::default() })
        };
        let machines = backends.iter().map(machine).collect::<Result<_, Error>>()?;
        let (config, name, classes) = (setup.config, setup.name, PageClasses::of(&setup.states));
        Ok(Rig { name, machines, agree, config, classes, n_step: 0, n_page: 0, n_slot: 0 })
    }

    /// Does the same to the states of every machine.
    pub fn states(&self, change: impl Fn(&dyn States)) {
        self.machines.iter().for_each(|m| change(&*m.states));
    }

    /// An empty sequence in a slot that was not used yet.
    pub fn sequence(&mut self) -> Sequence {
        // Slots and pages come in no particular order.
        assert!(self.n_slot < N_SLOT, "a rig has {N_SLOT} slots");
        let slot = SlotId((self.n_slot * 5 + 3) % N_SLOT);
        self.n_slot += 1;
        self.states(|s| s.slot_reset(slot));
        Sequence { n_past: 0, tables: vec![PageTable::default(); self.classes.len()], slot }
    }

    /// Sequences that may still be made.
    pub fn n_slot_free(&self) -> usize {
        (N_SLOT - self.n_slot) as usize
    }

    /// Gives `seq` pages for `n_rows` more rows.
    pub fn reserve(&mut self, seq: &mut Sequence, n_rows: usize) {
        for (class, table) in seq.tables.iter_mut().enumerate() {
            while table.end() * self.config.page_len < seq.n_past + n_rows {
                table.pages.push(self.page(class));
            }
        }
    }

    /// Gives back the pages that later rows of `seq` do not look at.
    pub fn give_back(&mut self, seq: &mut Sequence) {
        for (table, window) in seq.tables.iter_mut().zip(self.classes.windows()) {
            let first = first_cell(*window, seq.n_past) / self.config.page_len;
            for page in table.pages.drain(..first - table.first) {
                self.machines.iter().for_each(|m| m.states.page_release(page));
            }
            table.first = first;
        }
    }

    fn page(&mut self, class: usize) -> PageId {
        assert!(self.n_page < N_PAGE, "a rig has {N_PAGE} pages");
        let page = PageId((self.n_page * 389 + 3) % N_PAGE);
        self.n_page += 1;
        self.states(|s| s.page_alloc(page, class));
        page
    }

    /// A sequence with a copy of all that `seq` has.
    pub fn fork(&mut self, seq: &Sequence) -> Sequence {
        let mut fork = self.sequence();
        fork.n_past = seq.n_past;
        self.states(|s| {
            s.slot_save(seq.slot, SavedId(0));
            s.slot_load(SavedId(0), fork.slot);
            s.saved_release(SavedId(0));
        });
        for (class, table) in seq.tables.iter().enumerate() {
            fork.tables[class].first = table.first;
            for &from in &table.pages {
                let to = self.page(class);
                self.states(|s| s.page_copy(from, to));
                fork.tables[class].pages.push(to);
            }
        }
        fork
    }

    /// Makes the first `n_rows` rows of the last step final, `n_certain` of which are already.
    pub fn commit(&mut self, seq: &mut Sequence, n_rows: usize, n_certain: usize) {
        seq.n_past += n_rows;
        self.states(|s| s.slot_commit(seq.slot, n_rows - n_certain));
    }

    /// Makes `seq` empty, keeping its slot, and its pages where none is missing.
    pub fn reset(&mut self, seq: &mut Sequence) {
        seq.n_past = 0;
        for table in seq.tables.iter_mut().filter(|table| table.first > 0) {
            self.states(|s| table.pages.iter().for_each(|page| s.page_release(*page)));
            *table = PageTable::default();
        }
        self.states(|s| s.slot_reset(seq.slot));
    }

    /// Runs a plan over the parts and returns what the last machine made of every row.
    pub fn step(&mut self, plan: usize, parts: &[Part<'_>]) -> Vec<Vec<f32>> {
        let n: usize = parts.iter().map(|part| part.rows.len()).sum();
        self.step_outputs(plan, parts, &(0..n as u32).collect::<Vec<_>>())
    }

    /// [`step`](Self::step) with the rows whose output is wanted.
    pub fn step_outputs(&mut self, plan: usize, parts: &[Part<'_>], outputs: &[u32]) -> Vec<Vec<f32>> {
        let rows = || parts.iter().flat_map(|part| &part.rows);
        let tokens: Vec<u32> = rows().map(|row| row.token).collect();
        let positions: Vec<u32> = rows().map(|row| row.position).collect();
        let inputs: Vec<f32> = rows().flat_map(|row| row.input.iter().copied()).collect();
        let mut first = 0;
        let lane = |part: &Part<'_>| {
            let start = first;
            first += part.rows.len();
            (start..first, part.seq.n_past, part.n_certain, part.seq.slot)
        };
        let spans: Vec<_> = parts.iter().map(lane).collect();
        let lanes: Vec<Lane<'_>> = spans
            .into_iter()
            .zip(parts)
            .map(|((rows, n_past, n_certain, slot), part)| Lane {
                rows,
                n_past,
                n_certain,
                tables: &part.seq.tables,
                slot: Some(slot),
            })
            .collect();
        let step = Step { tokens: &tokens, inputs: &inputs, positions: &positions, lanes: &lanes, outputs };
        for machine in &mut self.machines {
            machine.execs[plan].run(&step, &mut machine.out);
        }
        let (first, others) = self.machines.split_first().expect("a rig has machines");
        for machine in others {
            let at = format!("{}, step {}, {} against {}", self.name, self.n_step, machine.name, first.name);
            let (a, b) = (&machine.out, &first.out);
            same(&at, self.agree, (&a.output, a.output_width), (&b.output, b.output_width));
            same(&format!("{at}, taps"), self.agree, (&a.taps, a.taps_width), (&b.taps, b.taps_width));
        }
        self.n_step += 1;
        let out = &self.machines.last().expect("a rig has machines").out;
        out.output.chunks_exact(out.output_width).map(<[f32]>::to_vec).collect()
    }
}

fn same(at: &str, agree: Agree, (got, width): (&[f32], usize), (want, want_width): (&[f32], usize)) {
    assert_eq!((got.len(), width), (want.len(), want_width), "{at}: values and their width");
    if width == 0 {
        return;
    }
    for (row, (got, want)) in got.chunks_exact(width).zip(want.chunks_exact(width)).enumerate() {
        let greatest = want.iter().fold(0.0, |max: f64, x| max.max(f64::from(x.abs())));
        for (column, (got, want)) in got.iter().zip(want).enumerate() {
            let agrees = match agree {
                Agree::Bits => got.to_bits() == want.to_bits(),
                // Not `>`: a NaN agrees with nothing.
                Agree::Within { tolerance, size } => {
                    (f64::from(*got) - f64::from(*want)).abs() <= tolerance * size.max(greatest)
                }
            };
            assert!(agrees, "{at}: row {row}, column {column}: {got:e}, expected {want:e}");
        }
    }
}
