//! A radix tree: values by sequences of tokens, which share the beginnings that they have in common.
//!
//! ```text
//!  root ──"the cat"──●──" sat"──● value        a node's tokens are the edges from the root to it
//!                    └──" ran"──● value        ● without a value: two sequences part here
//! ```
//!
//! Ids of nodes with a value stay as long as the value does.

use std::collections::BTreeMap;

use crate::Token;

/// A node of a [`Radix`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct NodeId(usize);

const ROOT: usize = 0;

#[derive(Debug)]
struct Node<T> {
    parent: usize,
    /// Tokens from the parent to here; empty for the root alone.
    edge: Vec<Token>,
    /// By the first token of their edges.
    children: BTreeMap<Token, usize>,
    /// Tokens from the root to here.
    depth: usize,
    value: Option<T>,
}

/// Where a sequence of tokens leaves a tree.
#[derive(Debug)]
pub(crate) struct Match {
    /// Nodes that it passes, root excluded, from the root down.
    pub path: Vec<NodeId>,
    /// Tokens that it shares with the tree.
    pub n_shared: usize,
    /// The node under which all sequences share these tokens.
    pub below: NodeId,
}

/// The tree.
#[derive(Debug)]
pub(crate) struct Radix<T> {
    nodes: Vec<Node<T>>,
    free: Vec<usize>,
    n_value: usize,
}

impl<T> Radix<T> {
    pub fn new() -> Radix<T> {
        let root = Node { parent: ROOT, edge: Vec::new(), children: BTreeMap::new(), depth: 0, value: None };
        Radix { nodes: vec![root], free: Vec::new(), n_value: 0 }
    }

    /// Values in it.
    pub fn len(&self) -> usize {
        self.n_value
    }

    /// Follows `tokens` as far as they lead.
    pub fn find(&self, tokens: &[Token]) -> Match {
        let (mut at, mut n_shared, mut path) = (ROOT, 0, Vec::new());
        while let Some(&child) = tokens.get(n_shared).and_then(|token| self.nodes[at].children.get(token)) {
            let edge = &self.nodes[child].edge;
            let n = n_common(edge, &tokens[n_shared..]);
            n_shared += n;
            at = child;
            if n < edge.len() {
                break;
            }
            path.push(NodeId(child));
        }
        Match { path, n_shared, below: NodeId(at) }
    }

    /// The value of exactly these tokens.
    pub fn exact(&self, tokens: &[Token]) -> Option<NodeId> {
        let found = self.find(tokens);
        let last = *found.path.last()?;
        (self.depth(last) == tokens.len() && self.get(last).is_some()).then_some(last)
    }

    /// Puts a value at `tokens`, of which there is at least one, and returns the node and the value it replaces.
    pub fn insert(&mut self, tokens: &[Token], value: T) -> (NodeId, Option<T>) {
        assert!(!tokens.is_empty(), "a value for no tokens");
        let found = self.find(tokens);
        let mut at = found.below.0;
        if found.n_shared < self.nodes[at].depth {
            at = self.split(at, found.n_shared);
        }
        if found.n_shared < tokens.len() {
            at = self.add(at, tokens[found.n_shared..].to_vec());
        }
        let old = self.nodes[at].value.replace(value);
        self.n_value += usize::from(old.is_none());
        (NodeId(at), old)
    }

    /// Takes a value out, and with it the nodes that only led to it.
    pub fn remove(&mut self, id: NodeId) -> Option<T> {
        let value = self.nodes[id.0].value.take()?;
        self.n_value -= 1;
        let mut at = id.0;
        while at != ROOT && self.nodes[at].value.is_none() && self.nodes[at].children.is_empty() {
            let parent = self.nodes[at].parent;
            let first = self.nodes[at].edge[0];
            self.nodes[parent].children.remove(&first);
            self.release(at);
            at = parent;
        }
        self.merge(at);
        Some(value)
    }

    /// Makes a node that nothing parts at one with its child.
    fn merge(&mut self, at: usize) {
        let node = &self.nodes[at];
        if at == ROOT || node.value.is_some() || node.children.len() != 1 {
            return;
        }
        let (parent, mut edge) = (node.parent, node.edge.clone());
        let Some((_, &child)) = node.children.first_key_value() else { return };
        let first = edge[0];
        edge.append(&mut self.nodes[child].edge);
        (self.nodes[child].edge, self.nodes[child].parent) = (edge, parent);
        self.nodes[parent].children.insert(first, child);
        self.release(at);
    }

    /// A node in the middle of the edge of `at`, at `depth`.
    fn split(&mut self, at: usize, depth: usize) -> usize {
        let parent = self.nodes[at].parent;
        let n = depth - self.nodes[parent].depth;
        let rest = self.nodes[at].edge.split_off(n);
        let first = std::mem::replace(&mut self.nodes[at].edge, rest);
        let middle = self.add(parent, first);
        let next = self.nodes[at].edge[0];
        self.nodes[middle].children.insert(next, at);
        self.nodes[at].parent = middle;
        middle
    }

    fn add(&mut self, parent: usize, edge: Vec<Token>) -> usize {
        let (first, depth) = (edge[0], self.nodes[parent].depth + edge.len());
        let node = Node { parent, edge, children: BTreeMap::new(), depth, value: None };
        let at = match self.free.pop() {
            Some(at) => {
                self.nodes[at] = node;
                at
            }
            None => {
                self.nodes.push(node);
                self.nodes.len() - 1
            }
        };
        self.nodes[parent].children.insert(first, at);
        at
    }

    fn release(&mut self, at: usize) {
        self.nodes[at].children.clear();
        self.nodes[at].edge = Vec::new();
        self.free.push(at);
    }

    pub fn get(&self, id: NodeId) -> Option<&T> {
        self.nodes[id.0].value.as_ref()
    }

    pub fn get_mut(&mut self, id: NodeId) -> Option<&mut T> {
        self.nodes[id.0].value.as_mut()
    }

    /// Tokens from the root to `id`.
    pub fn depth(&self, id: NodeId) -> usize {
        self.nodes[id.0].depth
    }

    /// The tokens of `id`.
    pub fn tokens(&self, id: NodeId) -> Vec<Token> {
        let mut edges: Vec<&[Token]> = self.up(id).map(|at| &self.nodes[at].edge[..]).collect();
        edges.reverse();
        edges.concat()
    }

    /// `id` and the nodes above it, the root excluded.
    fn up(&self, id: NodeId) -> impl Iterator<Item = usize> + '_ {
        std::iter::successors(Some(id.0), |&at| Some(self.nodes[at].parent)).take_while(|&at| at != ROOT)
    }

    /// Nodes above `id` that have a value, nearest first.
    pub fn above(&self, id: NodeId) -> impl Iterator<Item = NodeId> + '_ {
        self.up(id).skip(1).filter(|&at| self.nodes[at].value.is_some()).map(NodeId)
    }

    /// Tokens that `id` shares with another value's sequence at most, that of values below it excluded.
    pub fn n_shared(&self, id: NodeId) -> usize {
        self.nodes[self.nodes[id.0].parent].depth
    }

    /// Every node with a value at or under `id`.
    pub fn under(&self, id: NodeId) -> Vec<NodeId> {
        let (mut found, mut open) = (Vec::new(), vec![id.0]);
        while let Some(at) = open.pop() {
            if self.nodes[at].value.is_some() {
                found.push(NodeId(at));
            }
            open.extend(self.nodes[at].children.values());
        }
        found
    }

    /// Every node with a value.
    pub fn all(&self) -> Vec<NodeId> {
        self.under(NodeId(ROOT))
    }
}

/// Tokens that both begin with.
pub(crate) fn n_common(a: &[Token], b: &[Token]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use paceline_testkit::{Rng, Seeded};

    use super::*;

    /// Against a plain map, which is searched from end to end.
    fn check(seed: u64) {
        let _seeded = Seeded::new("a radix tree", seed);
        let mut rng = Rng::new(seed);
        let (mut tree, mut plain): (Radix<u64>, BTreeMap<Vec<Token>, u64>) = (Radix::new(), BTreeMap::new());
        let n_letter = rng.range(1..4);
        for step in 0..200 {
            let n = rng.range(1..12);
            let tokens: Vec<Token> = (0..n).map(|_| rng.range(0..n_letter) as Token).collect();
            match rng.range(0..3) {
                0 => assert_eq!(tree.insert(&tokens, step).1, plain.insert(tokens, step)),
                1 if !plain.is_empty() => {
                    let all = tree.all();
                    let id = *rng.pick(&all);
                    let tokens = tree.tokens(id);
                    assert_eq!((tree.depth(id), tree.exact(&tokens)), (tokens.len(), Some(id)));
                    assert_eq!(tree.remove(id), plain.remove(&tokens));
                }
                _ => {
                    let found = tree.find(&tokens);
                    let n_shared = plain.keys().map(|key| n_common(key, &tokens)).max().unwrap_or(0);
                    assert_eq!(found.n_shared, n_shared, "{tokens:?}");
                    let on_path = found.path.iter().filter_map(|&id| tree.get(id)).copied();
                    let prefixes = plain.iter().filter(|(key, _)| tokens.starts_with(key)).map(|(_, &v)| v);
                    assert_eq!(on_path.collect::<Vec<_>>(), prefixes.collect::<Vec<_>>());
                    let below: Vec<u64> =
                        tree.under(found.below).iter().filter_map(|&id| tree.get(id)).copied().collect();
                    let want: Vec<u64> = plain
                        .iter()
                        .filter(|(key, _)| n_common(key, &tokens) == n_shared)
                        .map(|(_, &v)| v)
                        .collect();
                    assert!(want.iter().all(|v| below.contains(v)), "{below:?} without {want:?}");
                }
            }
            assert_eq!((tree.len(), tree.all().len()), (plain.len(), plain.len()));
            // Nodes that nothing parts at are gone: at most one fork for each value but the first.
            let n_node = tree.nodes.len() - tree.free.len() - 1;
            assert!(
                n_node <= (2 * plain.len()).saturating_sub(1),
                "{n_node} nodes for {} values",
                plain.len()
            );
        }
    }

    #[test]
    fn any_history_is_that_of_a_plain_map() {
        (0..300).for_each(check);
    }

    #[test]
    fn what_is_above_comes_nearest_first() {
        let mut tree = Radix::new();
        for n in [2, 5, 3] {
            tree.insert(&[7; 5][..n], n);
        }
        let id = tree.exact(&[7; 5]).unwrap();
        assert_eq!(tree.above(id).filter_map(|id| tree.get(id)).copied().collect::<Vec<_>>(), [3, 2]);
        assert_eq!((tree.n_shared(id), tree.tokens(id)), (3, vec![7; 5]));
        assert_eq!(tree.exact(&[7; 4]), None);
    }
}
