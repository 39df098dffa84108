"""The data path: from a prepared corpus to the micro-batches of each optimizer step.

1. `blocks`: a corpus is a folder (or remote, `store`) of MDS shards (`mds`). A sample of a shard is a block: text tokens of
   consecutive documents. Every source has one or more slices, and a validation split that training never reads.
2. `lanes`: L lanes divide the blocks of each slice among themselves. A lane fills its packing buffer with blocks, each from
   the slice that is furthest behind its proportion in the phase's mix.
3. `packing`: the documents in the buffer are cut to the row length and packed into rows, which leave in a seeded order.
4. `loader`: the curriculum says how many rows the next optimizer step takes. Row g of a phase comes from lane g mod L, and
   rank r of W owns the lanes l with l mod W = r.
5. `masking`: rows become micro-batches without padding, and the tokens to predict are chosen. (`choices` does the same for
   the items of a multiple-choice task, which are read from a CSV file instead of a corpus.)
6. `worker`: a loader process prepares whole steps ahead of the trainer.

Example: two sources, `web` and `books`, in the proportions 3:1; L = 4 lanes; W = 2 ranks; steps of 6 rows.

- Lane 0 draws blocks from web, web, books, web, and so on. Lane 1 starts one block later in the same sequence of sources,
  lane 2 two blocks later, lane 3 three: so the four lanes together hold 3:1 at any moment. Each lane draws other blocks.
- Lanes 0 and 2 live on rank 0, lanes 1 and 3 on rank 1. Step 0 takes rows 0 to 5. Rank 0 takes row 0 from lane 0, row 2
  from lane 2, row 4 from lane 0 again; rank 1 takes row 1 from lane 1, row 3 from lane 3 and row 5 from lane 1.
- Rows are numbered across steps: step 1 takes rows 6 to 11 and begins with lane 2. On four ranks, or on one, the same rows
  make up the same steps, because only the owner of a lane changes.
- The mask of row g is drawn from the seed (run seed, phase, g), so it does not depend on the rank or the micro-batch.

State, all of it plain values in a checkpoint:

- Per lane (`LaneState`): how many buffers it has used up in this phase, how many rows of the open one it has served, the
  blocks drawn from each slice and the tokens drawn in this phase before the open buffer, and a checksum of that buffer.
  Resuming reads and packs one buffer per lane again, however far the run is.
- Per rank (`DataState`): its lanes' states and its token counts per phase. `merge_rank_states` combines the ranks' states at
  a save, and any number of ranks can continue from the result.
- Orders (of shards, blocks, rows, items) and masks are pure functions of seeds and positions, so they are never saved.

A step carries the state *after* it. The trainer saves the state that came with the step it has just taken, so steps that the
loader process has prepared ahead are prepared again after a resume.
"""
