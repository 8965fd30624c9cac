//! The CPU backend: weights stay where the file is mapped, states live in vectors that grow with use, and a
//! thread team works through the waves of a plan.

mod exec;
mod ops;
mod states;
#[cfg(test)]
mod tests;
mod weights;

use std::{
    any::Any,
    sync::{Arc, RwLock},
};

use paceline_kernels::{KernelTable, Team};

use crate::{Backend, Error, Exec, Plan, StateConfig, StateDecl, States, WeightId, WeightSource};

use exec::{CpuExec, Nanos, SHARE_FROM};
use states::CpuStates;
use weights::Weight;

/// The CPU of this machine.
pub struct CpuBackend {
    team: Arc<Team>,
    table: &'static KernelTable,
    weights: RwLock<Vec<Arc<Weight>>>,
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
        let team = Arc::new(Team::new(n_threads));
        Ok(CpuBackend { team, table, weights: RwLock::default(), share_from: SHARE_FROM })
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
}

impl Backend for CpuBackend {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn describe(&self) -> String {
        format!("CPU, {} kernels, {} threads", self.table.isa, self.team.n_threads())
    }

    fn upload(&self, source: &WeightSource) -> Result<WeightId, Error> {
        let weight = Weight::new(source)?;
        let mut weights = self.weights.write().unwrap_or_else(|e| e.into_inner());
        weights.push(Arc::new(weight));
        Ok(WeightId(weights.len() as u32 - 1))
    }

    fn alloc_states(&self, decls: &[StateDecl], config: StateConfig) -> Result<Arc<dyn States>, Error> {
        Ok(Arc::new(CpuStates::new(decls, config, self.team.clone(), self.table)))
    }

    fn compile(&self, plan: Arc<Plan>, states: &Arc<dyn States>) -> Result<Box<dyn Exec>, Error> {
        // An Arc of the trait can't be turned into one of the type, so the states are cloned: a handle.
        let any: &dyn Any = states.as_any();
        let states = any.downcast_ref::<CpuStates>().ok_or(Error::ForeignStates("cpu"))?.handle();
        let exec = CpuExec::new(plan, states, self.team.clone(), self.table, |id| self.weight(id));
        Ok(Box::new(exec.share_from(self.share_from)))
    }
}
