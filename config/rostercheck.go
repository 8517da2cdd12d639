package config

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// check adds what is wrong with the roster as a whole.
func (r *Roster) check(rep *report) {
	for i, m := range r.Hosts {
		if m.Name != "" {
			rep.labels[fmt.Sprintf("host[%d]", i)] = "host " + clip(strconv.Quote(m.Name))
		}
	}
	for i, k := range r.Keys {
		if k.Name != "" {
			rep.labels[fmt.Sprintf("key[%d]", i)] = "key " + clip(strconv.Quote(k.Name))
		}
	}
	rep.name("fleet", r.Fleet)
	if r.Version < 1 {
		rep.add("version", "%d: wants 1 or more, one more than the last", r.Version)
	}
	if len(r.Hosts) < 2 {
		rep.add("host", "%d hosts: wants two [[host]] at least, since two must sign together", len(r.Hosts))
	}
	r.checkHosts(rep)
	c := keyChecker{report: rep, hosts: map[string]*Member{}, names: distinct{}, keys: distinct{}}
	for i := range r.Hosts {
		if m := &r.Hosts[i]; c.hosts[m.Name] == nil {
			c.hosts[m.Name] = m
			c.known = append(c.known, m.Name)
		}
	}
	for i := range r.Keys {
		c.check(fmt.Sprintf("key[%d].", i), &r.Keys[i])
	}
}

func (r *Roster) checkHosts(rep *report) {
	names, addresses, pins := distinct{}, distinct{}, distinct{}
	for i, m := range r.Hosts {
		at := fmt.Sprintf("host[%d].", i)
		rep.name(at+"name", m.Name)
		names.add(rep, at+"name", m.Name, "two hosts cannot have one name")
		address, err := canonicalAddress(m.Address, true)
		if err != nil {
			rep.add(at+"address", "%s: %v", clip(strconv.Quote(m.Address)), err)
		}
		addresses.add(rep, at+"address", address, "two hosts cannot have one address")
		if m.Identity == (Pin{}) {
			rep.add(at+"identity", `missing: wants the pin that "conseald init" printed on that host`)
		} else {
			pins.add(rep, at+"identity", m.Identity.String(), "two hosts cannot have one identity: one of them is a copy")
		}
		rep.oneOf(at+"protector", m.Protector, "tpm", "hsm")
		if m.Role != "" {
			rep.oneOf(at+"role", m.Role, "recovery")
		}
	}
}

// distinct holds where values were set first.
type distinct map[string]string

func (d distinct) add(r *report, path, value, why string) {
	if value == "" {
		return
	}
	if first, seen := d[value]; seen {
		r.add(path, "%s is in line %d already: %s", clip(value), r.lines[first], why)
		return
	}
	d[value] = path
}

// keyChecker checks one key after the other.
type keyChecker struct {
	*report
	hosts map[string]*Member
	known []string
	names distinct
	keys  distinct // public keys
}

func (c *keyChecker) check(at string, k *Key) {
	c.name(at+"name", k.Name)
	c.names.add(c.report, at+"name", k.Name, "two keys cannot have one name")
	c.oneOf(at+"scheme", k.Scheme, "ed25519", "ecdsa-p256", "ecdsa-secp256k1", "bip340")
	c.oneOf(at+"state", k.State, "active", "suspended", "deleted")
	c.checkQuorum(at, k)
	c.checkNames(at+"hosts", k.Hosts)
	c.checkNames(at+"askers", k.Askers)
	if strings.TrimSpace(k.Purpose) == "" {
		c.add(at+"purpose", "missing: wants a few words on what the key signs")
	} else if len(k.Purpose) > 256 {
		c.add(at+"purpose", "longer than 256 bytes")
	}
	if k.Incarnation < 1 || k.Incarnation > 1000 {
		c.add(at+"incarnation", "%d: wants 1 to 1000", k.Incarnation)
	}
	c.checkBirth(at, k)
	if k.Refresh != 0 {
		c.lasts(at+"refresh", time.Duration(k.Refresh), time.Minute, 10*365*24*time.Hour)
	}
	c.lasts(at+"delete_after", time.Duration(k.DeleteAfter), 0, 365*24*time.Hour)
	for _, u := range k.Users {
		if !isUser(u) {
			c.add(at+"users", `%s: wants "uid:NUMBER" or the name of a user`, clip(strconv.Quote(u)))
		}
	}
	c.once(at+"users", k.Users)
}

func (c *keyChecker) checkQuorum(at string, k *Key) {
	signers := 0
	for _, name := range k.Hosts {
		if m := c.hosts[name]; m == nil || m.Role != "recovery" {
			signers++
		}
	}
	switch {
	case c.lines[at+"quorum"] == 0:
		c.add(at+"quorum", "missing: wants how many hosts it takes to sign, 2 or more")
	case k.Quorum < 2:
		c.add(at+"quorum", "%d: wants 2 or more, so that no host signs alone", k.Quorum)
	case len(k.Hosts) == 0 || c.broken[at+"hosts"]: // said of the hosts
	case k.Quorum > len(k.Hosts):
		c.add(at+"quorum", "%d of %d hosts: wants %d or fewer", k.Quorum, len(k.Hosts), len(k.Hosts))
	case k.Quorum > signers:
		c.add(at+"quorum", `%d, but only %d of the hosts sign: the others have role "recovery"`, k.Quorum, signers)
	}
	if len(k.Hosts) == 0 {
		c.add(at+"hosts", "empty: wants the names of the hosts that hold the key, 2 or more")
	}
}

// checkNames checks lists of hosts.
func (c *keyChecker) checkNames(path string, names []string) {
	for _, name := range names {
		if c.hosts[name] != nil {
			continue
		}
		hint := "add a [[host]]"
		if c.more > 0 {
			hint = "" // nobody will see it, and looking for names takes time
		} else if near := nearest(name, c.known); near != "" {
			hint = fmt.Sprintf("did you mean %q?", near)
		}
		c.add(path, "%s is not a host of this roster: %s", clip(strconv.Quote(name)), hint)
	}
	c.once(path, names)
}

func (c *keyChecker) checkBirth(at string, k *Key) {
	pinned := len(k.PublicKey) > 0
	switch {
	case k.Generate && k.State == "deleted":
		c.add(at+"generate", "the key is deleted: remove the mark")
	case k.Generate && pinned:
		c.add(at+"generate", "the key has a public_key, so it exists: remove the mark")
	}
	if k.State == "deleted" && !pinned {
		c.add(at+"public_key", "missing: a deleted key repeats its public key, so that the right one is erased")
	}
	if k.Prehashed && !strings.HasPrefix(k.Scheme, "ecdsa-") {
		c.add(at+"prehashed", "scheme %s signs whole messages only", k.Scheme)
	}
	if k.PrehashedPresignatures && !k.Prehashed {
		c.add(at+"prehashed_presignatures", "means nothing without `prehashed = true`")
	}
	if _, held := k.Open.Keep(); k.PrehashedPresignatures && !held {
		c.add(at+"prehashed_presignatures", "means nothing with `open = %q`: only keys that are held have presignatures", k.Open)
	}
	if !pinned {
		return
	}
	if wanted := publicKeyWanted(k.Scheme, k.PublicKey); wanted != "" {
		c.add(at+"public_key", "%s: wants %s", clip(k.PublicKey.String()), wanted)
	}
	c.keys.add(c.report, at+"public_key", k.PublicKey.String(), "two keys cannot be one")
}

// publicKeyWanted checks a public key's form only: whether it is a point of the
// curve is for the scheme to say. It returns what was wanted, "" if all is well.
func publicKeyWanted(scheme string, key PublicKey) string {
	switch scheme {
	case "ed25519", "bip340":
		if len(key) != 32 {
			return "32 bytes"
		}
	case "ecdsa-p256", "ecdsa-secp256k1":
		if len(key) != 33 || key[0] != 2 && key[0] != 3 {
			return "33 bytes, the first 02 or 03"
		}
	}
	return ""
}

// isUser tells whether s is "uid:NUMBER" or a user's name.
func isUser(s string) bool {
	if uid, ok := strings.CutPrefix(s, "uid:"); ok {
		n, err := strconv.ParseUint(uid, 10, 32)
		return err == nil && n != 1<<32-1 && strconv.FormatUint(n, 10) == uid
	}
	return userPattern.MatchString(s)
}
