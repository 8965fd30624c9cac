//! The CPU backend: matrices that products read are packed when a plan is compiled, other weights stay where the file is
//! mapped, states live in vectors that grow with use, and a thread team works through the waves of a plan.

mod attention;
mod exec;
mod moe;
mod ops;
mod quant;
mod ropes;
mod states;
#[cfg(test)]
mod tests;
mod weights;

use std::{
    any::Any,
    collections::HashSet,
    sync::{
        Arc, Mutex, RwLock,
        atomic::{AtomicUsize, Ordering},
    },
};

use paceline_kernels::{
    KernelTable, Team,
    packed::{Grain, PackedMatrix, PackedTable, TileMemory, tune},
};

use crate::{
    Backend, Error, Exec, Op, Plan, PlanWork, Rows, StateConfig, StateDecl, States, WeightId, WeightSource,
};

use exec::{CpuExec, Kernels, Nanos, SHARE_FROM};
use states::CpuStates;
use weights::Weight;

/// The environment variable that turns packing off, if it is 0: products then read the weights as the file has them.
pub const PACK_VARIABLE: &str = "PACELINE_PACK";

/// Called with the bytes of a plan's matrices that have been packed, and with all of them.
type OnProgress = Box<dyn Fn(usize, usize) + Send + Sync>;

/// The CPU of this machine.
pub struct CpuBackend {
    team: Arc<Team>,
    kernels: Kernels,
    weights: RwLock<Vec<Arc<Weight>>>,
    /// Whether matrices are packed.
    packs: bool,
    /// Held while a plan's matrices are packed.
    packing: Mutex<()>,
    on_progress: Option<OnProgress>,
    /// Waves of less work than this stay on the calling thread.
    share_from: Nanos,
}

impl CpuBackend {
    /// A backend of `n_threads` threads, or of one per core if that is 0. Fails if `PACELINE_ISA` asks for kernels
    /// that this machine does not have.
    pub fn new(n_threads: usize) -> Result<CpuBackend, Error> {
        let n_threads = match n_threads {
            0 => std::thread::available_parallelism().map_or(1, |n| n.get()),
            n => n,
        };
        let table = KernelTable::best().map_err(|e| Error::Kernels(e.to_string()))?;
        let packs = match std::env::var_os(PACK_VARIABLE).map(|v| v.to_string_lossy().into_owned()).as_deref()
        {
            None | Some("" | "1") => true,
            Some("0") => false,
            Some(asked) => {
                return Err(Error::Kernels(format!(
                    "{PACK_VARIABLE}={asked}: expected 0 (products read the file) or 1"
                )));
            }
        };
        Ok(CpuBackend {
            team: Arc::new(Team::new(n_threads)),
            kernels: Kernels { table, packed: PackedTable::of(table) },
            weights: RwLock::default(),
            packs,
            packing: Mutex::default(),
            on_progress: None,
            share_from: SHARE_FROM,
        })
    }

    /// With the kernels of another instruction set, by the name that `PACELINE_ISA` takes: for comparison.
    pub fn with_isa(self, isa: &str) -> Result<CpuBackend, Error> {
        let table = KernelTable::choose(Some(isa)).map_err(|e| Error::Kernels(e.to_string()))?;
        Ok(CpuBackend { kernels: Kernels { table, packed: PackedTable::of(table) }, ..self })
    }

    /// Calls `report(done, all)` while the matrices of a plan are packed, with bytes of the file: often, and from several
    /// threads. A plan whose matrices have all been packed reports nothing.
    pub fn on_progress(self, report: impl Fn(usize, usize) + Send + Sync + 'static) -> CpuBackend {
        CpuBackend { on_progress: Some(Box::new(report)), ..self }
    }

    /// Threads that compute.
    pub fn n_threads(&self) -> usize {
        self.team.n_threads()
    }

    fn weight(&self, id: WeightId) -> Arc<Weight> {
        // A panic elsewhere cannot leave the list half written.
        let weights = self.weights.read().unwrap_or_else(|e| e.into_inner());
        weights[id.0 as usize].clone()
    }

    /// Packs the matrices that products of `plan` read, those that no other plan had packed before.
    fn pack(&self, plan: &Plan) -> Result<(), Error> {
        // A panic elsewhere leaves a matrix packed or not packed.
        let _alone = self.packing.lock().unwrap_or_else(|e| e.into_inner());
        let mut seen = HashSet::new();
        let read = plan.ops.iter().filter_map(|op| match op {
            Op::MatMul { weight, .. } if seen.insert(*weight) => Some((self.weight(*weight), 1)),
            Op::ExpertMatMul { weight, n_expert, .. } if seen.insert(*weight) => {
                Some((self.weight(*weight), *n_expert))
            }
            _ => None,
        });
        let todo: Vec<(Arc<Weight>, usize, usize)> = read
            .filter_map(|(weight, n_expert)| weight.to_pack(n_expert).map(|bytes| (weight, n_expert, bytes)))
            .collect();
        let bytes = || todo.iter().map(|(_, _, bytes)| *bytes);
        let mut memory = TileMemory::reserve(bytes()).map_err(|_| Error::OutOfMemory {
            what: format!("packing {} matrices ({PACK_VARIABLE}=0 leaves them in the file)", todo.len()),
            bytes: bytes().sum(),
        })?;
        let all = todo.iter().map(|(weight, ..)| weight.file_bytes()).sum();
        let done = AtomicUsize::new(0);
        let progress = |bytes: usize| {
            let before = done.fetch_add(bytes, Ordering::Relaxed);
            if let Some(report) = &self.on_progress {
                report(before + bytes, all);
            }
        };
        let pack = |(weight, n_expert, _): &(Arc<Weight>, usize, usize)| {
            weight.pack(*n_expert, &mut memory, &self.team, &progress)
        };
        let mut packed: Vec<PackedMatrix> = todo.iter().filter_map(pack).collect();
        assert_eq!(packed.len(), todo.len(), "what has a packed size has a packed form");
        tune(self.kernels.packed, &mut packed, &self.team);
        todo.iter().zip(packed).for_each(|((weight, ..), packed)| weight.set_packed(packed));
        Ok(())
    }
}

impl Backend for CpuBackend {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn describe(&self) -> String {
        let unpacked = if self.packs { "" } else { ", weights not packed" };
        format!("CPU, {} kernels, {} threads{unpacked}", self.kernels.table.isa, self.team.n_threads())
    }

    fn upload(&self, source: &WeightSource) -> Result<WeightId, Error> {
        let weight = Weight::new(source)?;
        let mut weights = self.weights.write().unwrap_or_else(|e| e.into_inner());
        weights.push(Arc::new(weight));
        Ok(WeightId(weights.len() as u32 - 1))
    }

    fn alloc_states(&self, decls: &[StateDecl], config: StateConfig) -> Result<Arc<dyn States>, Error> {
        decls.iter().try_for_each(|decl| decl.check_kv(config.kv))?;
        Ok(Arc::new(CpuStates::new(decls, config, self.team.clone(), self.kernels.table)))
    }

    fn compile(&self, plan: Arc<Plan>, states: &Arc<dyn States>) -> Result<Box<dyn Exec>, Error> {
        // An Arc of the trait can't be turned into one of the type, so the states are cloned: a handle.
        let any: &dyn Any = states.as_any();
        let states = any.downcast_ref::<CpuStates>().ok_or(Error::ForeignStates("cpu"))?.handle();
        plan.check_windows(states.decls());
        if self.packs {
            self.pack(&plan)?;
        }
        let exec =
            CpuExec::new(plan, states, self.team.clone(), self.kernels, self.packs, |id| self.weight(id));
        Ok(Box::new(exec.share_from(self.share_from)))
    }

    fn work(&self, plan: &Plan) -> PlanWork {
        let mut work = PlanWork::default();
        let n_router = plan.ops.iter().filter(|op| matches!(op, Op::Router { .. })).count();
        let mut expert_bytes = 0;
        for op in &plan.ops {
            let (weight, dst, n_expert, n_used) = match op {
                Op::MatMul { weight, dst, .. } => (weight, dst, 1, 1),
                Op::ExpertMatMul { weight, dst, n_expert, ids, .. } => {
                    (weight, dst, *n_expert, plan.width(*ids))
                }
                _ => continue,
            };
            let weight = self.weight(*weight);
            let packed = weight.packed().filter(|_| self.packs);
            let bytes = packed.map_or(weight.file_bytes(), PackedMatrix::bytes) / n_expert;
            match op {
                Op::MatMul { .. } => work.weight_bytes += bytes as u64,
                _ => expert_bytes += bytes as u64,
            }
            let macs = match plan.rows(*dst) {
                Rows::Batch => &mut work.row,
                Rows::Output => &mut work.output,
            };
            let n = (weight.n_in() * weight.n_rows() / n_expert * n_used) as u64;
            match packed {
                Some(packed) if packed.grain() != Grain::F32 => macs.int += n,
                _ => macs.float += n,
            }
        }
        work.expert_bytes = expert_bytes.checked_div(n_router as u64).unwrap_or(0);
        work
    }
}
