"""The methods of the survey, one row each: what they do, and where it lives here or why it does not.

A row names what there is below `longtail`, and what is left out; "-" is a row of which
nothing is here. Marks are the branches of the survey's taxonomy, see `MARKS`.
"""

from jaxtricks import _table
from jaxtricks._arguments import checked

MARKS = {
    "S": "re-sampling",
    "C": "cost-sensitive learning",
    "L": "logit adjustment",
    "T": "transfer learning",
    "A": "data augmentation",
    "R": "representation learning",
    "D": "classifier design",
    "2": "decoupled training",
    "E": "ensemble",
}

# method | venue | marks | what it does | names here, or - | what is left out; a
# backslash goes on
_ROWS = """
LMLE | CVPR16 | SR | quintuplet loss over clusters | - | \
  needs clusters of the features, and a sampler of quintuplets
HFL | CVPR16 | R | hierarchy of class groups, fine-tuned one by one | - | \
  a training plan: fine-tune per group
Focal loss | ICCV17 | C | (1 - p_y)^g cross entropy | focal | the sigmoid form is optax's
Range loss | ICCV17 | R | distances within and between classes | - | \
  metric learning; `class_mean` has the centres
CRL | ICCV17 | R | triplets of hard minority examples | - | metric learning: mines within the batch
MetaModelNet | NeurIPS17 | T | few-shot to many-shot classifier weights by a network | - | \
  a model of its own
DSTL | CVPR18 | T | fine-tune on the source classes nearest by EMD | - | chooses data, trains nothing
Class-balanced loss | CVPR19 | C | weights (1 - b) / (1 - b^n) | class_balanced, weights.effective_number, \
  sampling.effective_number |
Bayesian estimate | CVPR19 | C | margin by uncertainty of MC dropout | - | give your own margins to `margin`
FTL | CVPR19 | TA | variance within head classes, given to the tail by PCA | - | needs a decoder of features
Unequal training | CVPR19 | R | one loss for the head, another for the tail | - | \
  for faces, with label noise
OLTR | CVPR19 | R | memory of centres, attention, cosine head | heads.cosine | \
  memory and attention are a model
DCL | ICCV19 | S | sampler from imbalanced to balanced | sampling.progressive | its metric-learning term
Meta-Weight-Net | NeurIPS19 | C | weight as a learned function of the loss | weighted | \
  its network; the step through the optimizer is shown at `weighted`
LDAM | NeurIPS19 | C | margin n^-1/4 on cosines, deferred weights | ldam, heads.normed, weights.deferred, \
  sampling.deferred |
Decoupling | ICLR20 | SCRD2 | cRT, LWS, tau-norm, NCM; four samplers | \
  decoupling.crt, decoupling.lws, decoupling.tau_norm, decoupling.ncm, sampling.class_aware_indices, \
  sampling.progressive |
LST | CVPR20 | ST | class-incremental phases with balanced replay | distill.kd | \
  the phases are a training plan
BBN | CVPR20 | SE | two branches, uniform and reversed sampling | \
  experts.bbn, weights.bbn, sampling.class_probabilities |
BAGS | CVPR20 | SE | softmax within groups of like counts | - | \
  mask with -inf and sum `cross_entropy` over groups
Domain adaptation | CVPR20 | C | class-balanced weight and a learned one | weights.effective_number | \
  meta-learning of the second
Equalization (ESQL) | CVPR20 | C | tail classes are left out as negatives | equalization |
DBM | CVPR20 | C | margin by domain frequency | margin | for faces: needs domains
M2m | CVPR20 | TA | head images translated into the tail | - | needs adversarial optimisation of inputs
LEAP | CVPR20 | TAR | feature clouds of head variance around tail features | - | \
  metric learning; `class_mean` has the centres
IEM | CVPR20 | R | episodic memory and attention of regions | - | a model of its own
SimCal | ECCV20 | S2E | a second, balanced head for proposals | \
  sampling.sample_indices, experts.aggregate | detection only
PRS | ECCV20 | S | reservoir sampling by class | - | continual learning: the stream has no counts
Distribution-balanced | ECCV20 | C | re-balanced, negative-tolerant binary loss | - | \
  for many labels at once; see `equalization_v2`
OFA | ECCV20 | TA2 | class-generic and specific features mixed | - | needs class activation maps
LFME | ECCV20 | TE | experts for groups of classes teach one student | distill.kd | \
  the self-paced choice of the teacher
Deep-RTC | ECCV20 | D | classifier on a taxonomy, with rejection | - | needs a taxonomy
Balanced meta-softmax | NeurIPS20 | SC | cross entropy of z + log n, learned sampler | \
  balanced_softmax, sampling.meta_rates | learning the sampler: differentiate through an update
UNO-IC | NeurIPS20 | L | posterior times a power of the prior ratio | posthoc.shift_prior | \
  its fusion of several sensors
De-confound (TDE) | NeurIPS20 | LD | head that subtracts what momentum explains | heads.tde, class_mean |
SSP | NeurIPS20 | TR | self-supervised pre-training first | - | any pre-training will do; then any loss here
Logit adjustment | ICLR21 | L | tau log pi in the loss or at test time | logit_adjusted, posthoc.adjust, \
  posthoc.fit_tau |
RIDE | ICLR21 | TE | diverse experts; routing; distillation | experts.ride, distill.kd | \
  the router that saves experts
KCL | ICLR21 | R2 | supervised contrast with k positives | - | see `experts.paco`
LTML | CVPR21 | SE | uniform and balanced branch, kept consistent | - | \
  for many labels at once; see `experts.bbn`
Equalization v2 | CVPR21 | C | weights by the ratio of positive to negative gradients | equalization_v2 |
Seesaw | CVPR21 | C | mitigation by counts, compensation by scores | seesaw, online_seesaw | \
  the objectness head of detection
ACSL | CVPR21 | C | negatives count only if their score is high | - | detection only
PML | CVPR21 | C | margins learned for ages | margin | ordinal classes only
LADE | CVPR21 | CL | prior-adjusted loss and a regulariser of the batch | lade, posthoc.shift_prior |
RoBal | CVPR21 | CLD | scale-invariant head under attack | heads.cosine, margin | \
  adversarial training is yours
DisAlign | CVPR21 | CL2 | confidence-weighted affine map of the logits | \
  decoupling.disalign, heads.disalign, weights.inverse_frequency |
MiSLAS | CVPR21 | CA2 | mixup, then label-aware smoothing and LWS | \
  mix.mixup, label_aware_smoothing, decoupling.lws | statistics of batch norm in stage two: your framework's
CReST | CVPR21 | T | keeps pseudo-labels of rare classes | sampling.class_probabilities | \
  rounds of self-training
Conceptual 12M | CVPR21 | T | pre-training on data from the web | - | a data set
RSG | CVPR21 | TA | generator of tail samples from head variation | - | a model of its own
MetaSAug | CVPR21 | A | learned covariance of features per class | - | needs bilevel training of covariances
Hybrid | CVPR21 | R | contrast first, classifier later, by 1 - (t/T)^2 | experts.bbn | \
  the schedule is `bbn(total).share`; contrast: `experts.paco`
Unsupervised discovery | CVPR21 | R | hierarchical self-supervision of instances | - | no labels, no counts
VideoLT | ICCV21 | S | more frames of classes that do badly | - | video only
LOCE | ICCV21 | SC | margins by mean score, memory of features | - | detection only
GIST | ICCV21 | ST2 | geometry of head weights given to the tail | - | a classifier of its own
FASA | ICCV21 | SA | Gaussian features, at an adapted rate | class_mean | drawing the features
ACE | ICCV21 | SE | experts for nested sets of classes | experts.aggregate | \
  mask logits with -inf per expert; its learning rates
IB | ICCV21 | C | cross entropy divided by the influence of the example | influence_balanced |
DARS | ICCV21 | T | pseudo-labels shared out by class | - | segmentation only
SSD | ICCV21 | T | self-distillation from a self-supervised teacher | distill.kd | \
  two heads and the teacher are yours
DiVE | ICCV21 | T | distillation from a balanced, flattened teacher | distill.dive |
MosaicOS | ICCV21 | T | scenes made of object pictures | - | detection data
PaCo | ICCV21 | R | contrast with learnable centres and log pi | experts.paco | \
  the momentum encoder is yours (optax.incremental_update)
DRO-LT | ICCV21 | R | robust loss around the centres | class_mean | the ball around a centre
DT2 | ICCV21 | 2 | two stages in turn, for relations | - | scene graphs only
SADE | beyond | E | experts for three priors, weighted at test time | experts.sade, experts.fit_weights |
ResLT | beyond | E | residual branches for medium and few | experts.aggregate | \
  its sums of branches are a model
VS, CDT | beyond | L | temperature by class, and log pi | vs, cdt |
UniMix, Remix | beyond | A | mixup that favours the tail | mix.unimix, mix.remix | \
  CMO pastes tail crops: `mix.mixup` on a mask
Weight balancing | beyond | C | weight decay and a bound on the norms | heads.tau_normalize, heads.max_norm |
"""


@checked
def methods() -> _table.Table:
    """The methods of the survey, in its order, and some that it does not have.

    Returns:
      A table; print it, or read its rows (method, venue, marks, what it does, here,
      left out). `here` names what there is below `longtail`, None where the method is
      out; `left out` says what is missing or why, None where nothing is. "beyond" are
      methods that are not in the survey's table.

    >>> table = methods()
    >>> table.rows[2]
    ('Focal loss', 'ICCV17', 'C', '(1 - p_y)^g cross entropy', 'focal', "the sigmoid form is optax's")
    >>> sum(row[1] != "beyond" for row in table.rows)
    66

    References:
      Zhang et al., Deep long-tailed learning: a survey, arXiv 2110.04596, table 2.
    """
    lines = _ROWS.strip().splitlines()
    rows = [tuple(" ".join(cell.split()) for cell in line.split("|")) for line in lines]
    rows = [(*r[:4], None if r[4] == "-" else r[4], r[5] or None) for r in rows]
    marks = ", ".join(f"{mark} {meaning}" for mark, meaning in MARKS.items())
    headers = ("method", "venue", "marks", "what it does", "here", "left out")
    return _table.make(headers, rows, notes=[f"marks: {marks}"])
