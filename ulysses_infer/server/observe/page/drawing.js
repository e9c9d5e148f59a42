// Shared drawing helpers: elements, number formats, colours, canvases that fit their container, the tooltip.

const byId = (id) => document.getElementById(id);

function element(kind, properties = {}, ...children) {
  const made = Object.assign(document.createElement(kind), properties);
  made.append(...children);
  return made;
}

function swatch(color) {
  const made = element("i", { className: "swatch" });
  made.style.background = color;
  return made;
}

const missing = "–";

const formats = {
  count: (value) => (value === null || value === undefined ? missing : Math.round(value).toLocaleString("en")),
  rate(value) {
    if (value === null || value === undefined) return missing;
    return value < 10 ? value.toFixed(1) : Math.round(value).toLocaleString("en");
  },
  short(value) {
    if (value >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
    return value >= 1e4 ? `${+(value / 1e3).toPrecision(3)}k` : `${+value.toPrecision(4)}`;
  },
  bytes: (value) => (value < 1e9 ? `${+(value / 1e6).toPrecision(3)} MB` : `${+(value / 1e9).toPrecision(3)} GB`),
  share(value) {
    if (value === null || value === undefined) return missing;
    return value > 0 && value < 0.0995 ? `${(value * 100).toFixed(1)} %` : `${Math.round(value * 100)} %`;
  },
  duration(value) {
    if (value === null || value === undefined) return missing;
    if (value < 0.9995) return `${+(value * 1000).toPrecision(value < 0.01 ? 2 : 3)} ms`;
    return `${+value.toPrecision(3)} s`;
  },
  brief(value) {
    if (value === null || value === undefined) return missing;
    return value < 0.9995 ? `${+(value * 1000).toPrecision(value < 0.1 ? 2 : 3)} ms` : `${+value.toPrecision(2)} s`;
  },
  ago(seconds) {
    const whole = Math.max(0, Math.round(seconds));
    if (whole < 60) return `${whole} s ago`;
    return `${Math.floor(whole / 60)} min ${whole % 60} s ago`;
  },
  long(seconds) {
    const whole = Math.floor(seconds);
    const parts = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
    const first = parts.findIndex(([size]) => whole >= size);
    if (first < 0) return "0 s";
    return parts.slice(first, first + 2).map(([size, name], number) => {
      const above = number ? parts[first][0] : Infinity;
      return `${Math.floor((whole % above) / size)} ${name}`;
    }).join(" ");
  },
};

const colors = {
  read() {
    const style = getComputedStyle(document.documentElement);
    const names = ["sp", "tp", "mixed", "mixed-2", "mixed-3", "one", "two", "three", "four", "faint", "grid", "dim",
      "text", "well", "line", "card", "good", "warn", "bad"];
    for (const name of names) this[name] = style.getPropertyValue(`--${name}`).trim();
  },
  // Colours of sequence parallel, tensor parallel and mixed modes as in the terminal; mixed modes differ in shade.
  ofMode(modes, number) {
    const kind = modes[number].kind;
    if (kind !== "mixed") return this[kind];
    const rank = modes.slice(0, number).filter((mode) => mode.kind === "mixed").length % 3;
    return rank ? this[`mixed-${rank + 1}`] : this.mixed;
  },
};
colors.read();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => colors.read());

const marks = { sp: "■", tp: "□", mixed: "▣" };

class Surface {
  constructor(canvas) {
    this.canvas = canvas;
    this.width = this.height = 0;
    new ResizeObserver(() => this.fit()).observe(canvas);
    this.fit();
  }

  fit() {
    const ratio = window.devicePixelRatio || 1;
    this.width = this.canvas.clientWidth;
    this.height = this.canvas.clientHeight;
    this.canvas.width = Math.round(this.width * ratio);
    this.canvas.height = Math.round(this.height * ratio);
  }

  clear() {
    const context = this.canvas.getContext("2d");
    const ratio = window.devicePixelRatio || 1;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, this.width, this.height);
    context.font = `11px ${getComputedStyle(document.body).fontFamily}`;
    context.lineWidth = 1;
    return context;
  }
}

function drawText(context, text, x, y, align = "left", color = colors.dim) {
  context.fillStyle = color;
  context.textAlign = align;
  context.textBaseline = "middle";
  context.fillText(text, x, y);
}

const timeSteps = { 60: [10, 20], 120: [20, 30], 300: [60, 60], 900: [180, 300] };
const narrow = 560;

// Ticks are at fixed distances from now, so that they do not move with the data.
function drawTimeAxis(context, view, left, right, y) {
  const step = timeSteps[view.seconds][right - left < narrow ? 1 : 0];
  for (let ago = 0; ago <= view.seconds; ago += step) {
    const x = right - ((right - left) * ago) / view.seconds;
    const label = ago === 0 ? "now" : ago % 60 === 0 ? `−${ago / 60} min` : `−${ago} s`;
    const align = ago === 0 ? "right" : ago === view.seconds ? "left" : "center";
    drawText(context, label, x, y, align);
  }
}

const tip = {
  box: byId("tip"),
  show(event, head, lines) {
    const rows = lines.map(([color, name, value]) => {
      const row = element("p", {}, ...(color ? [swatch(color)] : []), name);
      row.append(element("b", { textContent: value }));
      return row;
    });
    this.box.replaceChildren(element("p", { className: "head", textContent: head }), ...rows);
    this.box.hidden = false;
    const { offsetWidth: width, offsetHeight: height } = this.box;
    const x = event.clientX + 16 + width > innerWidth ? event.clientX - width - 16 : event.clientX + 16;
    const y = Math.min(event.clientY + 14, innerHeight - height - 6);
    this.box.style.left = `${Math.max(4, x)}px`;
    this.box.style.top = `${Math.max(4, y)}px`;
  },
  hide() {
    this.box.hidden = true;
  },
};
