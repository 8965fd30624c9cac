//! How a tensor's values move and change between the checkpoint and the file.
//!
//! Every tensor is looked at as a matrix of rows. An output row comes from one source row (`rows` says which), its values
//! are picked from that row (`cols`) and mapped (`map`); so a tensor of any size is converted a few rows at a time.

/// The order of rows or columns.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Order {
    /// As in the checkpoint.
    Same,
    /// Value heads of a gated delta rule, `len` indices each, behind `first` indices that stay. The checkpoint groups them
    /// by key head, `t = kh * r_len + r`; the file tiles them, `t = r * n_key + kh`, where `r_len = n_value / n_key`.
    ValueHeads {
        /// Indices in front of the first value head.
        first: usize,
        /// Indices of one value head.
        len: usize,
        /// Key heads.
        n_key: usize,
        /// Value heads.
        n_value: usize,
    },
    /// Rotary pairs inside each head: the checkpoint pairs `i` with `i + head_dim / 2`, the file `2 i` with `2 i + 1`.
    RopePairs {
        /// Rows of one head.
        head_dim: usize,
    },
    /// Sections of `n` runs of `stride` rows each: the first section of every run, then the second of every run, then the
    /// third; a section is its first row and its length. What is in no section is left out.
    Sections {
        /// Runs.
        n: usize,
        /// Rows of a run.
        stride: usize,
        /// `(first, len)`, inside of a run.
        sections: [(usize, usize); 3],
    },
}

impl Order {
    /// The checkpoint's index of what is at index `i` of the file.
    pub(crate) fn source(self, i: usize) -> usize {
        match self {
            Order::Same => i,
            Order::ValueHeads { first, .. } if i < first => i,
            Order::ValueHeads { first, len, n_key, n_value } => {
                let (head, within) = ((i - first) / len, (i - first) % len);
                let (r, kh) = (head / n_key, head % n_key);
                first + (kh * (n_value / n_key) + r) * len + within
            }
            Order::RopePairs { head_dim } => {
                let (head, within) = (i / head_dim, i % head_dim);
                head * head_dim + (within % 2) * (head_dim / 2) + within / 2
            }
            Order::Sections { n, stride, sections } => {
                let mut i = i;
                for (first, len) in sections {
                    if i < n * len {
                        return i / len * stride + first + i % len;
                    }
                    i -= n * len;
                }
                panic!("{self:?} has {i} rows less")
            }
        }
    }
}

/// What happens to each value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Map {
    /// Nothing.
    Same,
    /// `w + 1`: norms whose checkpoint holds the distance from 1.
    AddOne,
    /// `-exp(w)`: a decay rate from its logarithm.
    NegExp,
}

impl Map {
    pub(crate) fn apply(self, x: f32) -> f32 {
        match self {
            Map::Same => x,
            Map::AddOne => x + 1.0,
            Map::NegExp => -x.exp(),
        }
    }
}

/// Everything that is done to one tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Layout {
    pub(crate) rows: Order,
    pub(crate) cols: Order,
    pub(crate) map: Map,
}

impl Layout {
    /// As in the checkpoint.
    pub(crate) const SAME: Layout = Layout { rows: Order::Same, cols: Order::Same, map: Map::Same };

    pub(crate) fn rows(rows: Order) -> Layout {
        Layout { rows, ..Layout::SAME }
    }

    pub(crate) fn cols(cols: Order) -> Layout {
        Layout { cols, ..Layout::SAME }
    }

    pub(crate) fn map(map: Map) -> Layout {
        Layout { map, ..Layout::SAME }
    }

    /// Appends the output row that belongs to a source row.
    pub(crate) fn convert_row(&self, source: &[f32], out: &mut Vec<f32>) {
        out.extend((0..source.len()).map(|i| self.map.apply(source[self.cols.source(i)])));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The order as the permutation that it is, from its definition by nested loops.
    fn check(order: Order, expected: Vec<usize>) {
        let n = expected.len();
        let got: Vec<usize> = (0..n).map(|i| order.source(i)).collect();
        assert_eq!(got, expected, "{order:?}");
        let mut sorted = got;
        sorted.sort_unstable();
        assert!(sorted.into_iter().eq(0..n), "{order:?} loses or doubles an index");
    }

    #[test]
    fn value_heads_go_from_grouped_to_tiled() {
        for (first, len, n_key, r_len) in
            [(0, 1, 2, 3), (0, 10, 2, 3), (40, 10, 2, 3), (60, 10, 3, 2), (7, 4, 5, 1)]
        {
            let mut expected: Vec<usize> = (0..first).collect();
            for r in 0..r_len {
                for kh in 0..n_key {
                    // The checkpoint's view [n_key, r_len, len], walked with the first two axes swapped.
                    expected.extend((0..len).map(|i| first + kh * r_len * len + r * len + i));
                }
            }
            check(Order::ValueHeads { first, len, n_key, n_value: n_key * r_len }, expected);
        }
        // By hand: 2 key heads with 3 value heads each, named by their key head.
        check(Order::ValueHeads { first: 0, len: 1, n_key: 2, n_value: 6 }, vec![0, 3, 1, 4, 2, 5]);
    }

    #[test]
    fn rotary_halves_become_neighbours() {
        check(Order::RopePairs { head_dim: 6 }, vec![0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]);
        check(Order::Same, vec![0, 1, 2]);
    }

    #[test]
    fn sections_of_runs_are_gathered() {
        // Two runs q k v v z z.
        let order = Order::Sections { n: 2, stride: 6, sections: [(0, 1), (1, 1), (2, 2)] };
        let got: Vec<usize> = (0..8).map(|i| order.source(i)).collect();
        assert_eq!(got, [0, 6, 1, 7, 2, 3, 8, 9]);
        let order = Order::Sections { n: 3, stride: 4, sections: [(2, 2), (0, 0), (0, 0)] };
        let got: Vec<usize> = (0..6).map(|i| order.source(i)).collect();
        assert_eq!(got, [2, 3, 6, 7, 10, 11]);
    }

    #[test]
    fn values_are_picked_then_mapped() {
        let order = Order::RopePairs { head_dim: 4 };
        let mut out = Vec::new();
        Layout { cols: order, map: Map::AddOne, ..Layout::SAME }.convert_row(&[1.0, 2.0, 3.0, 4.0], &mut out);
        assert_eq!(out, [2.0, 4.0, 3.0, 5.0]);
        assert_eq!(Map::NegExp.apply(0.0), -1.0);
    }
}
