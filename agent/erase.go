package agent

import (
	"context"

	"conseal/agent/vault"
)

// erasuresAtOnce is how often shares are erased before that is rationed.
const erasuresAtOnce = 100

// erase drops what is below an epoch that a quorum has taken up, and what was never born:
// all keys' at once, as each erasure takes a root.
func (a *Agent) erase(ctx context.Context) {
	v := a.vault.Load()
	if v == nil {
		return
	}
	var drops []vault.Drop
	for _, k := range a.keys() {
		if !a.mine(k) {
			continue
		}
		record, _ := v.Record(k.id)
		b := a.born(k, v)
		numbers, leaves := b.Erasable(&record)
		if leaves {
			if err := a.retire(ctx, k, v, b.Base.Certificate); err != nil {
				a.log.Error("erasing what this host held", "key", k.id.Name, "error", err)
			}
		}
		drops = append(drops, unbornShares(k, v, record)...)
		for _, n := range numbers {
			drops = append(drops, vault.Drop{Key: k.id, Number: n})
		}
	}
	if len(drops) == 0 || a.erasures.Tokens() < 1 && !crowded(drops) {
		return
	}
	if err := v.Drop(ctx, drops); err != nil {
		a.log.Error("erasing old shares", "error", err)
		return
	}
	a.erasures.Allow() // what failed took no root
	for _, d := range drops {
		a.log.Info("share erased", "key", d.Key.Name, "epoch", d.Number.String())
	}
}

// crowded tells whether old shares of one key are so many that they must go.
func crowded(drops []vault.Drop) bool {
	of := map[vault.KeyID]int{}
	for _, d := range drops {
		if of[d.Key]++; of[d.Key] >= leftovers {
			return true
		}
	}
	return false
}

// unbornShares lists what attempts at the birth of a key left, once it is born: of this
// incarnation, and of earlier ones.
func unbornShares(k *key, v *vault.Vault, record vault.Record) (drops []vault.Drop) {
	if record.Active == (vault.Number{}) {
		return nil
	}
	unborn := func(r vault.Record) {
		for _, s := range r.Staged {
			if made, _ := v.Origin(r.Key, s.Number); made.Parent == [32]byte{} && s.Number != r.Active {
				drops = append(drops, vault.Drop{Key: r.Key, Number: s.Number})
			}
		}
	}
	for i := uint64(1); i < k.id.Incarnation; i++ {
		earlier, _ := v.Record(vault.KeyID{Name: k.id.Name, Incarnation: i})
		unborn(earlier)
	}
	if made, ok := v.Origin(k.id, record.Active); ok && made.Parent == [32]byte{} { // else its birth is below, and so are they
		unborn(record)
	}
	return drops
}

// retire erases what this host held of a key that others hold now, by that certificate.
func (a *Agent) retire(ctx context.Context, k *key, v *vault.Vault, confirmed [32]byte) error {
	k.mu.Lock()
	n := k.known
	k.mu.Unlock()
	if n.id != confirmed {
		return nil // a later one came meanwhile, of which this host may be a holder
	}
	encoded, err := n.certificate.Encode()
	if err != nil {
		return err
	}
	if err := v.Retire(ctx, k.id, n.number(), encoded); err != nil {
		return err
	}
	a.log.Info("the host holds this key no more, and has erased its shares", "key", k.id.Name, "epoch", n.number().String())
	a.nudge()
	return nil
}

// leftovers is how many shares of resharings that came to nothing a host keeps before it
// erases them: each erasure takes a root.
const leftovers = 16

// makeRoom erases what resharings before n left that came to nothing: shares above all
// that this host voted for, so that none of them can have a certificate. Without it a
// host that fails again and again would fill the others' vaults, for good. Births keep
// all, by [epoch.Next].
func (a *Agent) makeRoom(ctx context.Context, k *key, v *vault.Vault, n vault.Number) error {
	record, _ := v.Record(k.id)
	voted := record.Active
	if record.Voted != nil && record.Voted.Number.Compare(voted) > 0 {
		voted = record.Voted.Number
	}
	var drops []vault.Drop
	for _, s := range record.Staged {
		made, _ := v.Origin(k.id, s.Number)
		if made.Parent != [32]byte{} && s.Number.Compare(voted) > 0 && s.Number.Compare(n) < 0 {
			drops = append(drops, vault.Drop{Key: k.id, Number: s.Number})
		}
	}
	if len(drops) < leftovers {
		return nil
	}
	return v.Drop(ctx, drops)
}
