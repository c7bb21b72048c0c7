//! A load as a page: its table, and plots as inline SVG. The page needs nothing else.

use std::fmt::Write;

use super::run::Record;
use super::summary::Summary;

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;\
    padding:0 1em}pre{background:#f4f4f4;padding:1em;overflow:auto}\
    svg{width:100%;height:auto}text{font-size:11px;fill:#555}";
const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 200.0;
const MARGIN: f64 = 44.0;
/// Points that a curve is drawn with.
const POINTS: usize = 400;

/// The page.
pub fn html(title: &str, summary: &Summary, records: &[Record]) -> String {
    let answers =
        || records.iter().filter_map(|record| Some((record, record.outcome.as_ref().ok()?)));
    let ms = |time: std::time::Duration| time.as_secs_f64() * 1e3;
    let first = answers().filter_map(|(_, answer)| answer.first).map(ms).collect();
    let gaps = answers().flat_map(|(_, answer)| answer.gaps.iter().copied()).map(ms).collect();
    let total = answers().map(|(_, answer)| ms(answer.total)).collect();
    let over_time = answers()
        .filter_map(|(record, answer)| Some((record.sent.as_secs_f64(), ms(answer.first?))))
        .collect::<Vec<_>>();
    let mut page = format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>{title}</title>\
         <style>{STYLE}</style><h1>{title}</h1><pre>{table}</pre>",
        title = escaped(title),
        table = escaped(&summary.table()),
    );
    for (name, times) in
        [("Time to first token", first), ("Inter-token latency", gaps), ("End to end", total)]
    {
        let caption = format!("{name}: share of times (up) that are at most so many ms (right)");
        page += &plot(&caption, &shares(times), true);
    }
    page += &plot(
        "Time to first token in ms (up) of what was sent at second (right)",
        &over_time,
        false,
    );
    page +=
        &plot("Chunks with text a second (up), over seconds (right)", &chunk_rate(records), true);
    page
}

/// The distribution's curve, thinned.
fn shares(mut times: Vec<f64>) -> Vec<(f64, f64)> {
    times.sort_unstable_by(f64::total_cmp);
    let count = times.len();
    let points = POINTS.min(count);
    let at = |point: usize| (point + 1) * count / points - 1;
    (0..points).map(at).map(|at| (times[at], (at + 1) as f64 / count as f64)).collect()
}

/// Chunks in each fiftieth of the time, as a rate.
fn chunk_rate(records: &[Record]) -> Vec<(f64, f64)> {
    let mut times = Vec::new();
    for record in records {
        let Ok(answer) = &record.outcome else { continue };
        let Some(first) = answer.first else { continue };
        let mut at = record.sent + first;
        times.push(at.as_secs_f64());
        for &gap in &answer.gaps {
            at += gap;
            times.push(at.as_secs_f64());
        }
    }
    let bin = times.iter().copied().fold(0.0, f64::max) / 50.0;
    let mut counts = [0usize; 51];
    for time in &times {
        counts[(time / bin.max(1e-9)) as usize % 51] += 1;
    }
    let rate =
        |(index, &count): (usize, &usize)| (index as f64 * bin, count as f64 / bin.max(1e-9));
    counts[..50].iter().enumerate().map(rate).collect()
}

fn plot(caption: &str, points: &[(f64, f64)], joined: bool) -> String {
    let max = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).fold(1e-9, f64::max);
    let (x_max, y_max) = (max(|point| point.0), max(|point| point.1));
    let x = |value: f64| MARGIN + value / x_max * (WIDTH - 2.0 * MARGIN);
    let y = |value: f64| HEIGHT - MARGIN / 2.0 - value / y_max * (HEIGHT - MARGIN);
    let mut svg = format!("<h2>{caption}</h2><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">");
    for share in [0.0, 0.25, 0.5, 0.75, 1.0] {
        let (x, y, right) = (x(share * x_max), y(share * y_max), WIDTH - MARGIN);
        let _ = write!(
            svg,
            "<path d=\"M{MARGIN} {y:.1}H{right}\" stroke=\"#ddd\"/>\
             <text x=\"2\" y=\"{y:.1}\">{}</text>\
             <text x=\"{x:.1}\" y=\"{HEIGHT}\">{}</text>",
            rounded(share * y_max),
            rounded(share * x_max),
        );
    }
    if joined {
        let line: Vec<String> =
            points.iter().map(|point| format!("{:.1},{:.1}", x(point.0), y(point.1))).collect();
        let _ = write!(
            svg,
            "<polyline fill=\"none\" stroke=\"#06c\" stroke-width=\"1.5\" points=\"{}\"/>",
            line.join(" ")
        );
    } else {
        for point in points {
            let (x, y) = (x(point.0), y(point.1));
            let _ = write!(svg, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"1.5\" fill=\"#06c\"/>");
        }
    }
    svg + "</svg>"
}

/// To three digits or so, for an axis.
fn rounded(value: f64) -> String {
    let decimals = if value >= 100.0 {
        0
    } else if value >= 1.0 {
        1
    } else {
        3
    };
    format!("{value:.decimals$}")
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
