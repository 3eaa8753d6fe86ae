/* The network of a run: what minicode/model.py, codebook.py, topk.py and control.py do, with no
   library, one position at a time. Weights and activations are float32, as there; sums are doubles.

   C  n_embd            G  groups of a codebook (the heads of a layer)
   T  positions         d  dimensions of one of them, or of a head
   V  vocabulary        N  codes in one group, of which k are chosen
   (m, n) is a matrix: one Float32Array, m rows of n numbers. */

/** The sum of x[i] * y[i], over n numbers from two places on. */
function dot(x, xAt, y, yAt, n) {
  let a = 0, b = 0, c = 0, d = 0, i = 0;  // four sums, so that no addition waits for the last one
  for (; i + 3 < n; i += 4) {
    a += x[xAt + i] * y[yAt + i];
    b += x[xAt + i + 1] * y[yAt + i + 1];
    c += x[xAt + i + 2] * y[yAt + i + 2];
    d += x[xAt + i + 3] * y[yAt + i + 3];
  }
  for (; i < n; i++) a += x[xAt + i] * y[yAt + i];
  return a + b + (c + d);
}

/** W x + b: x (n), weight (m, n), bias (m) or none -> (m). */
function linear(x, { weight, bias }) {
  const n = x.length, y = new Float32Array(weight.length / n);
  for (let i = 0; i < y.length; i++) y[i] = dot(weight, i * n, x, 0, n) + (bias ? bias[i] : 0);
  return y;
}

/** x (n) with mean 0 and variance 1, times weight, plus bias, if there are any. */
function layerNorm(x, { weight, bias } = {}) {
  let mean = 0, variance = 0;
  for (const value of x) mean += value / x.length;
  for (const value of x) variance += (value - mean) ** 2 / x.length;
  const scale = 1 / Math.sqrt(variance + 1e-5);
  if (!weight) return x.map((value) => (value - mean) * scale);
  return x.map((value, i) => (value - mean) * scale * weight[i] + bias[i]);
}

/** The error function, by its series, to the last digits of a double. */
function erf(x) {
  if (Math.abs(x) > 6) return Math.sign(x);
  let term = x, sum = x;
  for (let n = 1; Math.abs(term) > 1e-17 * Math.abs(sum); n++) {
    term *= (2 * x * x) / (2 * n + 1);
    sum += term;
  }
  return (2 / Math.sqrt(Math.PI)) * Math.exp(-x * x) * sum;
}

const gelu = (x) => x.map((value) => (value / 2) * (1 + erf(value * Math.SQRT1_2)));
const add = (x, y) => x.map((value, i) => value + y[i]);

function softmax(x) {
  const most = x.reduce((a, b) => Math.max(a, b), -Infinity);
  const p = Float64Array.from(x, (value) => Math.exp(value - most));
  const total = p.reduce((a, b) => a + b);
  return p.map((value) => value / total);
}

/** Attention of one position, q (C), to keys and values, T of (C) each: (C), head by head. */
function attend(q, keys, values, nHead) {
  const d = q.length / nHead, y = new Float32Array(q.length);
  for (let from = 0; from < q.length; from += d) {
    const p = softmax(keys.map((key) => dot(q, from, key, from, d) / Math.sqrt(d)));  // (T)
    for (let i = from; i < from + d; i++) {
      let sum = 0;
      for (let t = 0; t < p.length; t++) sum += p[t] * values[t][i];
      y[i] = sum;
    }
  }
  return y;
}

/** The k highest of scores (N), best first; of equals the lower id. */
function best(scores, k) {
  const ids = [];
  for (let i = 0; i < scores.length; i++) {
    if (ids.length === k && !(scores[i] > scores[ids[k - 1]])) continue;
    let slot = ids.length;
    while (slot > 0 && scores[i] > scores[ids[slot - 1]]) slot--;
    ids.splice(slot, 0, i);
    ids.length = Math.min(ids.length, k);
  }
  return ids;
}

/** Replaces an activation by a sum of its codes: codes (G, N, d), k of N for each group. */
class Codebook {
  constructor(codes, [groups, nCodes, dim], k, config) {
    Object.assign(this, { codes, groups, nCodes, dim, k });
    this.norm = config.layer_norm;
    this.pursuit = config.selection === "pursuit" && k > 1;
    // Every similarity is x·c * scale + offset, as in topk.py.
    this.scale = new Float32Array(groups * nCodes).fill(1);
    this.offset = new Float32Array(groups * nCodes);
    for (let i = 0; i < groups * nCodes; i++) {
      const square = dot(codes, i * dim, codes, i * dim, dim);
      if (config.similarity === "cosine") this.scale[i] = square ? 1 / Math.sqrt(square) : 0;
      if (config.similarity === "distance") this.offset[i] = -square / 2;
    }
    this.zeros = new Float32Array(groups * nCodes);
    this.products = [];  // of a code with all of its group: what choosing it takes off them
  }

  /** What x (G * d) becomes, and the ids of each group: [q (G * d), G lists of k]. */
  replace(x, edits) {
    const q = new Float32Array(x.length), chosen = [];
    for (let group = 0; group < this.groups; group++) {
      const from = group * this.dim;
      const part = x.subarray(from, from + this.dim);
      const a = this.norm ? layerNorm(part) : part;
      const ids = this.choose(a, group, edits.filter((edit) => edit.group === group));
      for (const id of ids) {
        const row = (group * this.nCodes + id) * this.dim;
        for (let i = 0; i < this.dim; i++) q[from + i] += this.codes[row + i];
      }
      chosen.push(ids);
    }
    return [q, chosen];
  }

  /** The ids chosen for a (d), with codes forced and blocked as in control.py. */
  choose(a, group, edits) {
    const ids = (kind) => edits.filter((edit) => edit.kind === kind).map((edit) => edit.id);
    const forced = ids("force"), blocked = new Set(ids("block"));
    let chosen = this.search(a, group, new Set());
    if (chosen.some((id) => blocked.has(id))) chosen = this.search(a, group, blocked);
    const held = chosen.map((id) => forced.includes(id));  // slots of forced codes
    for (const id of forced) {
      if (chosen.includes(id)) continue;
      const last = held.lastIndexOf(false);
      if (last < 0) throw new Error(`at most ${this.k} codes can be forced at a place`);
      chosen[last] = id;
      held[last] = true;
    }
    if (chosen.some((id) => blocked.has(id))) throw new Error("a code is both forced and blocked");
    return chosen;
  }

  /** k ids for a (d): the most similar; or each the most similar to what is left over. */
  search(a, group, blocked) {
    if (this.nCodes - blocked.size < this.k) {
      throw new Error(`at most ${this.nCodes - this.k} codes can be blocked at a place`);
    }
    const scores = this.similarities(a, 0, group);
    blocked.forEach((id) => { scores[id] = -Infinity; });
    if (!this.pursuit) return best(scores, this.k);
    const ids = best(scores, 1);
    while (ids.length < this.k) {
      const last = ids.at(-1), row = group * this.nCodes + last;
      const products = this.products[row] ??=
        this.similarities(this.codes, row * this.dim, group, this.zeros);
      scores[last] = -Infinity;
      let next = 0;
      for (let i = 0; i < this.nCodes; i++) {
        scores[i] -= products[i];
        if (scores[i] > scores[next]) next = i;
      }
      ids.push(next);
    }
    return ids;
  }

  /** Of a, d numbers from a place on, and all codes of a group: (N). */
  similarities(a, from, group, offset = this.offset) {
    const first = group * this.nCodes;
    const scores = new Float64Array(this.nCodes);
    for (let i = 0; i < this.nCodes; i++) {
      const product = dot(a, from, this.codes, (first + i) * this.dim, this.dim);
      scores[i] = product * this.scale[first + i] + offset[first + i];
    }
    return scores;
  }
}

/** Where the codebook of a site stands in the model of model.py. */
const PATHS = {
  head: "attn.head_codebook", attn: "attn.attn_codebook", mlp_mid: "mlp.mlp_mid_codebook",
  mlp: "mlp.mlp_codebook", block: "block_codebook",
};

/** The GPT. config: of the run; parameters: [[name, shape], ...]; numbers: all their values. */
class Network {
  constructor({ config, parameters, numbers }) {
    Object.assign(this, { config, weights: {}, books: {} });
    const shapes = {};
    let from = 0;
    for (const [name, shape] of parameters) {
      const end = from + shape.reduce((a, b) => a * b, 1);
      this.weights[name] = numbers.subarray(from, end);
      shapes[name] = shape;
      from = end;
    }
    const k = { head: config.k_head, mlp_mid: config.k_mlp, mlp: config.k_mlp };
    for (let layer = 0; layer < config.n_layer; layer++) {
      for (const [site, path] of Object.entries(PATHS)) {
        const codes = `h.${layer}.${path}.codes`;
        const book = [this.weights[codes], shapes[codes], k[site] || config.k, config];
        if (shapes[codes]) this.books[`${site}.${layer}`] = new Codebook(...book);
      }
    }
  }

  module(name) {
    return { weight: this.weights[`${name}.weight`], bias: this.weights[`${name}.bias`] };
  }

  /** Nothing read yet. Lists over positions: by layer keys and values (C); by site codes (G lists
      of k). structuredClone makes a copy, to be continued in another way. */
  past() {
    return { length: 0, keys: {}, values: {}, codes: {} };
  }

  /** Reads one more token, with edits; what is behind the last block: x (C).
      edits: [{ kind: "force" or "block", site: "mlp.1", group, id, first, last }, ...], of which
      first and last are positions. */
  read(past, token, edits = []) {
    const { n_embd: C, n_layer: nLayer, n_head: nHead, block_size: room } = this.config;
    const position = past.length++;
    if (position >= room) throw new Error(`the network reads ${room} tokens at most`);
    const here = edits.filter((edit) => edit.first <= position && position <= edit.last);
    const row = (name, i) => this.module(name).weight.subarray(i * C, (i + 1) * C);
    const listed = (lists, name, value) => (lists[name] ??= []).push(value);
    const replace = (site, x) => {
      if (!this.books[site]) return x;
      const [q, ids] = this.books[site].replace(x, here.filter((edit) => edit.site === site));
      listed(past.codes, site, ids);
      return q;
    };
    let x = add(row("wte", token), row("wpe", position));  // (C)
    for (let layer = 0; layer < nLayer; layer++) {
      const of = (name) => this.module(`h.${layer}.${name}`);
      const qkv = linear(layerNorm(x, of("ln_1")), of("attn.c_attn"));  // (3 * C)
      listed(past.keys, layer, qkv.subarray(C, 2 * C));
      listed(past.values, layer, qkv.subarray(2 * C));
      const y = attend(qkv.subarray(0, C), past.keys[layer], past.values[layer], nHead);  // (C)
      const heads = replace(`head.${layer}`, y);
      x = add(x, replace(`attn.${layer}`, linear(heads, of("attn.c_proj"))));
      const hidden = gelu(linear(layerNorm(x, of("ln_2")), of("mlp.c_fc")));  // (4 * C)
      const mid = replace(`mlp_mid.${layer}`, hidden);
      x = replace(`block.${layer}`, add(x, replace(`mlp.${layer}`, linear(mid, of("mlp.c_proj")))));
    }
    return x;
  }

  /** The logits (V) of the next token, behind x (C). */
  logits(x) {
    return linear(layerNorm(x, this.module("ln_f")), this.module("lm_head"));
  }
}
