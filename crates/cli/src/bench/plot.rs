//! A line chart as SVG: axes from zero, ticks at round numbers, a legend.

use std::fmt::Write;

/// A chart.
pub struct Plot {
    /// Above it.
    pub title: String,
    /// Below the title, smaller.
    pub subtitle: String,
    /// Along the horizontal axis.
    pub x: String,
    /// Along the vertical one.
    pub y: String,
    /// Its lines.
    pub series: Vec<Series>,
}

/// A line of a chart.
pub struct Series {
    /// What the legend calls it.
    pub name: String,
    /// From left to right.
    pub points: Vec<(f64, f64)>,
    /// Dashed and without dots: what was computed and not measured.
    pub is_ideal: bool,
}

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 440.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 66.0;
const BOTTOM: f64 = 56.0;
/// Told apart by people who see few colours, too.
const COLOURS: [&str; 4] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7"];
const GREY: &str = "#777777";

impl Plot {
    /// The whole file.
    pub fn to_svg(&self) -> String {
        let all = || self.series.iter().flat_map(|series| &series.points);
        let (step_x, end_x) = axis(all().map(|point| point.0).fold(0.0, f64::max));
        let (step_y, end_y) = axis(all().map(|point| point.1).fold(0.0, f64::max));
        let at_x = |x: f64| LEFT + x / end_x * (WIDTH - LEFT - RIGHT);
        let at_y = |y: f64| HEIGHT - BOTTOM - y / end_y * (HEIGHT - TOP - BOTTOM);
        let mut out = String::new();
        let mut line = |text: std::fmt::Arguments| {
            let _ = writeln!(out, "{text}"); // a string takes everything
        };
        line(format_args!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" \
             height=\"{HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">"
        ));
        line(format_args!("<rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>"));
        line(format_args!("<text x=\"{LEFT}\" y=\"26\" font-size=\"16\">{}</text>", escaped(&self.title)));
        line(format_args!("<text x=\"{LEFT}\" y=\"46\" fill=\"{GREY}\">{}</text>", escaped(&self.subtitle)));
        for i in 0..=(end_y / step_y).round() as usize {
            let (value, y) = (i as f64 * step_y, at_y(i as f64 * step_y));
            let right = WIDTH - RIGHT;
            line(format_args!(
                "<line x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{right}\" y2=\"{y:.1}\" stroke=\"#dddddd\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                LEFT - 8.0,
                y + 4.0,
                number(value, step_y)
            ));
        }
        let floor = at_y(0.0);
        for i in 0..=(end_x / step_x).round() as usize {
            let (value, x) = (i as f64 * step_x, at_x(i as f64 * step_x));
            line(format_args!(
                "<line x1=\"{x:.1}\" y1=\"{floor:.1}\" x2=\"{x:.1}\" y2=\"{:.1}\" stroke=\"black\"/>\
                 <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                floor + 5.0,
                floor + 20.0,
                number(value, step_x)
            ));
        }
        line(format_args!(
            "<polyline points=\"{LEFT},{TOP} {LEFT},{floor:.1} {:.1},{floor:.1}\" fill=\"none\" stroke=\"black\"/>",
            WIDTH - RIGHT
        ));
        line(format_args!(
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            (LEFT + WIDTH - RIGHT) / 2.0,
            HEIGHT - 14.0,
            escaped(&self.x)
        ));
        let middle = (TOP + floor) / 2.0;
        line(format_args!(
            "<text x=\"18\" y=\"{middle:.1}\" text-anchor=\"middle\" transform=\"rotate(-90 18 {middle:.1})\">{}</text>",
            escaped(&self.y)
        ));
        let mut colours = COLOURS.iter().cycle();
        for (i, series) in self.series.iter().enumerate() {
            let colour = if series.is_ideal { GREY } else { colours.next().unwrap_or(&GREY) };
            let dash = if series.is_ideal { " stroke-dasharray=\"6 4\"" } else { "" };
            let points: Vec<String> =
                series.points.iter().map(|&(x, y)| format!("{:.1},{:.1}", at_x(x), at_y(y))).collect();
            line(format_args!(
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"{dash}/>",
                points.join(" ")
            ));
            for &(x, y) in series.points.iter().filter(|_| !series.is_ideal) {
                line(format_args!(
                    "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3.5\" fill=\"{colour}\"/>",
                    at_x(x),
                    at_y(y)
                ));
            }
            let y = TOP + 14.0 + 18.0 * i as f64;
            line(format_args!(
                "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"{colour}\" stroke-width=\"2\"{dash}/>\
                 <text x=\"{:.1}\" y=\"{y:.1}\">{}</text>",
                LEFT + 16.0,
                y - 4.0,
                LEFT + 44.0,
                y - 4.0,
                LEFT + 52.0,
                escaped(&series.name)
            ));
        }
        out.push_str("</svg>\n");
        out
    }
}

/// Distance of ticks, and the end of an axis that holds `max`: ticks are 1, 2 or 5 times a power of ten.
fn axis(max: f64) -> (f64, f64) {
    let max = if max > 0.0 && max.is_finite() { max } else { 1.0 };
    let rough = max / 6.0;
    let power = 10f64.powf(rough.log10().floor());
    let factor = [1.0, 2.0, 5.0, 10.0].into_iter().find(|factor| factor * power >= rough).unwrap_or(10.0);
    let step = factor * power;
    (step, (max / step).ceil() * step)
}

fn number(value: f64, step: f64) -> String {
    let digits = (-step.log10().floor()).max(0.0) as usize;
    format!("{value:.digits$}")
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plot(points: &[(f64, f64)]) -> String {
        let series = |is_ideal| Series { name: "a < b & c".to_string(), points: points.to_vec(), is_ideal };
        Plot {
            title: "5 > 4".to_string(),
            subtitle: "\"quoted\"".to_string(),
            x: "rows".to_string(),
            y: "ms".to_string(),
            series: vec![series(false), series(true)],
        }
        .to_svg()
    }

    #[test]
    fn ticks_are_round_and_reach_the_largest_value() {
        let check = |max: f64, want: (f64, f64)| {
            let (step, end) = axis(max);
            assert!((step - want.0).abs() < 1e-9 && (end - want.1).abs() < 1e-9, "{max}: {step} to {end}");
        };
        check(32.0, (10.0, 40.0));
        check(6.0, (1.0, 6.0));
        check(0.31, (0.1, 0.4));
        check(1234.0, (500.0, 1500.0));
        check(0.0, (0.2, 1.0));
        check(f64::NAN, (0.2, 1.0));
        assert_eq!((number(0.2, 0.1).as_str(), number(500.0, 500.0).as_str()), ("0.2", "500"));
    }

    /// Every tag is closed, and nothing of the text is taken for one.
    #[test]
    fn the_file_is_well_formed() {
        for points in [&[][..], &[(1.0, 2.0), (32.0, 7.5)]] {
            let svg = plot(points);
            let mut open = Vec::new();
            for tag in svg.split('<').skip(1) {
                let (tag, text) = tag.split_once('>').expect("a tag ends");
                assert!(!text.contains('>') && tag.matches('"').count() % 2 == 0, "{tag}");
                match tag.strip_prefix('/') {
                    Some(name) => assert_eq!(open.pop(), Some(name), "{svg}"),
                    None if tag.ends_with('/') => {}
                    None => open.push(tag.split_whitespace().next().unwrap()),
                }
            }
            assert!(open.is_empty(), "{open:?}");
            assert!(svg.contains("a &lt; b &amp; c") && !svg.contains("NaN"), "{svg}");
        }
    }

    #[test]
    fn points_lie_inside_the_axes() {
        let svg = plot(&[(1.0, 2.0), (32.0, 7.5)]);
        assert_eq!(svg.matches("<circle").count(), 2, "the ideal line has no dots");
        for part in svg.split("<circle cx=\"").skip(1) {
            let x: f64 = part.split('"').next().unwrap().parse().unwrap();
            assert!((LEFT..=WIDTH - RIGHT).contains(&x), "{x}");
        }
    }
}
