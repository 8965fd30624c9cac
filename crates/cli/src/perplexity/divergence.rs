//! How far one model's predictions are from another's, row by row, and what is said about all rows.
//!
//! `p` is the base, `q` the model that is measured, both a softmax over the vocabulary.
//!
//! | figure | meaning |
//! |---|---|
//! | KLD | `Σ p (ln p - ln q)`: what the base loses if it is coded by the other; 0 only if they are equal |
//! | Δp | `q - p` of the token that the text has; its mean says whether the text is predicted worse, its root mean square by how much predictions move |
//! | same top | share of rows whose likeliest token is the same |
//! | ln ratio | `ln PPL(q) - ln PPL(p)`, with the error of the mean of differences, which is far smaller than that of either |

use serde_json::{Value, json};

use super::window::{LogProbs, row_by_row};

/// What is known of a row.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Row {
    kld: f64,
    ln_p: f64,
    ln_q: f64,
    same_top: bool,
}

/// Figures over rows.
#[derive(Debug, Default)]
pub struct Divergence {
    rows: Vec<Row>,
}

/// Shares of the rows that lie below a quantile.
const QUANTILES: [(f64, &str); 9] = [
    (0.999, "99.9%"),
    (0.99, "99.0%"),
    (0.95, "95.0%"),
    (0.90, "90.0%"),
    (0.5, "median"),
    (0.10, "10.0%"),
    (0.05, "5.0%"),
    (0.01, "1.0%"),
    (0.001, "0.1%"),
];

impl Row {
    fn new(base: &[f32], ours: &[f32], token: u32) -> Row {
        let (p, q) = (LogProbs::of(base), LogProbs::of(ours));
        let mut kld = 0.0;
        let (mut top_p, mut top_q) = (0, 0);
        for (t, (&x, &y)) in base.iter().zip(ours).enumerate() {
            let ln_p = p.ln_p(x);
            let probability = ln_p.exp();
            if probability > 0.0 {
                kld += probability * (ln_p - q.ln_p(y));
            }
            top_p = if x > base[top_p] { t } else { top_p };
            top_q = if y > ours[top_q] { t } else { top_q };
        }
        let (ln_p, ln_q) = (p.of_token(base, token), q.of_token(ours, token));
        // Rounding may leave a hair below zero.
        Row { kld: kld.max(0.0), ln_p, ln_q, same_top: top_p == top_q }
    }

    fn delta(&self) -> f64 {
        self.ln_q.exp() - self.ln_p.exp()
    }
}

impl Divergence {
    /// Adds rows of logits, both `[tokens.len(), n_vocab]`, and the tokens that the text has behind them.
    pub fn add(&mut self, base: &[f32], ours: &[f32], tokens: &[u32]) {
        assert_eq!(base.len(), ours.len());
        let width = ours.len() / tokens.len();
        let row = |i: usize, ours: &[f32]| Row::new(&base[i * width..(i + 1) * width], ours, tokens[i]);
        self.rows.extend(row_by_row(ours, width, row));
    }

    fn figures(&self) -> Figures {
        let of = |value: fn(&Row) -> f64| self.rows.iter().map(value).collect::<Vec<_>>();
        let (p, q) = (mean(&of(|row| -row.ln_p)), mean(&of(|row| -row.ln_q)));
        let ratio = mean(&of(|row| row.ln_p - row.ln_q));
        let squares = mean(&of(|row| row.delta() * row.delta()));
        let rms = squares.0.sqrt();
        let top = mean(&of(|row| f64::from(u8::from(row.same_top))));
        Figures {
            base: (p.0.exp(), p.0.exp() * p.1),
            ours: (q.0.exp(), q.0.exp() * q.1),
            ln_ratio: ratio,
            kld: mean(&of(|row| row.kld)),
            klds: sorted(of(|row| row.kld)),
            delta: mean(&of(Row::delta)),
            deltas: sorted(of(Row::delta)),
            rms: (rms, if rms > 0.0 { 0.5 * squares.1 / rms } else { 0.0 }),
            same_top: top,
        }
    }

    /// Name and text of each figure.
    pub fn lines(&self) -> Vec<(String, String)> {
        let f = self.figures();
        let with = |(mean, error): (f64, f64)| format!("{mean:.6} ± {error:.6}");
        let percent = |(mean, error): (f64, f64)| format!("{:.3} ± {:.3} %", 100.0 * mean, 100.0 * error);
        let mut lines = vec![
            ("perplexity of the base".to_string(), with(f.base)),
            ("ln(PPL / PPL of the base)".into(), with(f.ln_ratio)),
            ("PPL / PPL of the base".into(), with((f.ln_ratio.0.exp(), f.ln_ratio.0.exp() * f.ln_ratio.1))),
            ("PPL - PPL of the base".into(), format!("{:.6}", f.ours.0 - f.base.0)),
            ("KLD, mean".into(), with(f.kld)),
            ("KLD, largest".into(), format!("{:.6}", quantile(&f.klds, 1.0))),
        ];
        lines.extend(
            QUANTILES
                .map(|(share, name)| (format!("KLD, {name}"), format!("{:.6}", quantile(&f.klds, share)))),
        );
        lines.push(("KLD, least".into(), format!("{:.6}", quantile(&f.klds, 0.0))));
        lines.push(("Δp, mean".into(), percent(f.delta)));
        lines.push(("Δp, root mean square".into(), percent(f.rms)));
        let at = |share: f64| format!("{:.3} %", 100.0 * quantile(&f.deltas, share));
        lines.push(("Δp, largest".into(), at(1.0)));
        lines.extend(QUANTILES.map(|(share, name)| (format!("Δp, {name}"), at(share))));
        lines.push(("Δp, least".into(), at(0.0)));
        lines.push(("same likeliest token".into(), percent(f.same_top)));
        lines
    }

    /// The figures.
    pub fn to_json(&self) -> Value {
        let f = self.figures();
        let quantiles = |values: &[f64]| -> Value {
            let all = [(1.0, "max")].into_iter().chain(QUANTILES).chain([(0.0, "min")]);
            all.map(|(share, name)| (name.to_string(), json!(quantile(values, share))))
                .collect::<serde_json::Map<_, _>>()
                .into()
        };
        json!({
            "n": self.rows.len(),
            "base_perplexity": f.base.0,
            "base_perplexity_error": f.base.1,
            "ln_ratio": f.ln_ratio.0,
            "ln_ratio_error": f.ln_ratio.1,
            "mean": f.kld.0,
            "mean_error": f.kld.1,
            "quantiles": quantiles(&f.klds),
            "delta_p": { "mean": f.delta.0, "mean_error": f.delta.1, "rms": f.rms.0, "rms_error": f.rms.1, "quantiles": quantiles(&f.deltas) },
            "same_top": f.same_top.0,
            "same_top_error": f.same_top.1,
        })
    }
}

/// Means with their standard errors, and sorted values.
struct Figures {
    base: (f64, f64),
    ours: (f64, f64),
    ln_ratio: (f64, f64),
    kld: (f64, f64),
    klds: Vec<f64>,
    delta: (f64, f64),
    deltas: Vec<f64>,
    rms: (f64, f64),
    same_top: (f64, f64),
}

/// Mean and its standard error.
fn mean(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / n;
    (mean, (variance / (n - 1.0).max(1.0)).sqrt())
}

fn sorted(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_by(f64::total_cmp);
    values
}

/// The value below which this share lies, between two by a straight line.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let at = share * (sorted.len() - 1) as f64;
    let (lo, hi) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    lo + (hi - lo) * at.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logits(p: &[f64], shift: f64) -> Vec<f32> {
        p.iter().map(|p| (p.ln() + shift) as f32).collect()
    }

    #[test]
    fn divergence_of_known_distributions() {
        // KL((1/2, 1/4, 1/4) ‖ (1/4, 1/4, 1/2)) = 1/2 ln 2 - 1/4 ln 2.
        let (p, q) = (logits(&[0.5, 0.25, 0.25], 3.0), logits(&[0.25, 0.25, 0.5], -40.0));
        let row = Row::new(&p, &q, 2);
        assert!((row.kld - 0.25 * 2f64.ln()).abs() < 1e-5, "{row:?}");
        assert!((row.delta() - 0.25).abs() < 1e-5 && !row.same_top, "{row:?}");
        // It is not symmetric, knows no shift, and is exactly 0 for equal logits.
        let (p, q) = (logits(&[0.9, 0.05, 0.05], 0.0), logits(&[0.4, 0.3, 0.3], 0.0));
        assert!((Row::new(&p, &q, 0).kld - Row::new(&q, &p, 0).kld).abs() > 0.05);
        assert!(Row::new(&p, &logits(&[0.9, 0.05, 0.05], 7.0), 0).kld < 1e-6);
        assert_eq!(Row::new(&p, &p, 1).kld, 0.0);
    }

    #[test]
    fn figures_of_two_rows() {
        let (p, q) = (logits(&[0.5, 0.25, 0.25], 0.0), logits(&[0.25, 0.25, 0.5], 0.0));
        let mut all = Divergence::default();
        all.add(&[&p[..], &p].concat(), &[&p[..], &q].concat(), &[0, 2]);
        let f = all.figures();
        assert!((f.kld.0 - 0.125 * 2f64.ln()).abs() < 1e-5 && (f.same_top.0 - 0.5).abs() < 1e-12);
        assert!((f.delta.0 - 0.125).abs() < 1e-5 && (f.rms.0 - 0.25 / 2f64.sqrt()).abs() < 1e-5);
        assert!((f.ln_ratio.0 + 0.5 * 2f64.ln()).abs() < 1e-5);
        assert_eq!(all.lines().len(), 6 + 9 + 1 + 3 + 9 + 2);
    }

    #[test]
    fn quantiles_lie_on_lines() {
        assert_eq!(quantile(&[1.0, 2.0, 4.0], 0.5), 2.0);
        assert_eq!(quantile(&[1.0, 2.0, 4.0], 0.75), 3.0);
        assert_eq!((quantile(&[5.0], 0.0), quantile(&[5.0], 1.0)), (5.0, 5.0));
    }
}
