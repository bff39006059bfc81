//! The curves of loss and accuracy, as an SVG file.

use std::error::Error;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::{Course, Epoch};

/// Wide and light below, narrow and dark above: curves that agree are both seen.
const STYLES: [(RGBColor, u32); 2] = [(RGBColor(160, 190, 230), 7), (RGBColor(20, 60, 120), 2)];

/// Draws both courses, the last one below.
pub fn draw(courses: &[Course; 2], path: &Path) -> Result<(), Box<dyn Error>> {
    let area = SVGBackend::new(path, (960, 400)).into_drawing_area();
    area.fill(&WHITE)?;
    let (left, right) = area.split_horizontally(480);
    panel(&left, "loss in training", courses, |epoch| epoch.loss)?;
    panel(&right, "test accuracy in %", courses, |epoch| 100.0 * epoch.accuracy)?;
    area.present()?;
    Ok(())
}

fn panel(
    area: &DrawingArea<SVGBackend, Shift>,
    title: &str,
    courses: &[Course; 2],
    value: impl Fn(&Epoch) -> f64,
) -> Result<(), Box<dyn Error>> {
    let values = || courses.iter().flat_map(|course| course.epochs.iter().map(&value));
    let (least, greatest) = values().fold((f64::MAX, f64::MIN), |(least, greatest), value| {
        (least.min(value), greatest.max(value))
    });
    let margin = 0.05 * (greatest - least).max(1e-3);
    let epochs = courses[0].epochs.len();
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(52)
        .build_cartesian_2d(1.0..epochs.max(2) as f64, least - margin..greatest + margin)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_desc("epoch")
        .x_labels(epochs.min(12))
        .x_label_formatter(&|epoch| format!("{epoch:.0}"))
        .draw()?;
    for (course, (color, width)) in courses.iter().rev().zip(STYLES) {
        let style = color.stroke_width(width);
        let points = (1..).map(f64::from).zip(course.epochs.iter().map(&value));
        chart
            .draw_series(LineSeries::new(points, style))?
            .label(course.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 24, y)], style));
    }
    chart
        .configure_series_labels()
        .position(
            if value(&courses[0].epochs[0]) > value(&courses[0].epochs[epochs - 1]) {
                SeriesLabelPosition::UpperRight
            } else {
                SeriesLabelPosition::LowerRight
            },
        )
        .legend_area_size(32)
        .background_style(WHITE)
        .border_style(BLACK.mix(0.3))
        .label_font(("sans-serif", 14))
        .draw()?;
    Ok(())
}
